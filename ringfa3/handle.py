"""The handle of a call made with async_op=True."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from ringfa3.lane import Started, Tensors

T = TypeVar("T")


class Handle(Generic[T]):
    """A call under way. Until `wait`, leave q, k and v as they are; between them, do what you like.

    The arguments were checked, and all ranks agreed on them, when the call was made; what goes wrong later (RankFailed)
    is raised by `wait`. Where gradients are wanted, `wait` is the operation that autograd sees.
    """

    def __init__(self, started: Started, inputs: Sequence[Tensor], finish: Callable[[Tensors], T]) -> None:
        self._started, self._inputs = started, inputs
        self._versions = [x._version for x in inputs]
        self._finish: Callable[[Tensors], T] | None = finish
        self._result: T | None = None

    def done(self) -> bool:
        """Whether `wait` would return without waiting. Does not say whether the call went well."""
        return self._finish is None or self._started.done()

    def wait(self) -> T:
        """The call's result; the same one whenever asked. On CUDA the current stream waits, not the host.

        Raises:
            RankFailed: another rank died or stopped.
            RuntimeError: q, k or v was written to meanwhile: the result may have been computed from either.
        """
        if self._finish is not None:
            result = self._started.result()
            for name, x, version in zip("qkv", self._inputs, self._versions, strict=True):
                if x._version != version:
                    raise RuntimeError(
                        f"{name}: wanted it untouched until wait(), got {x._version - version} writes to it"
                    )
            self._result = self._finish(result)
            self._finish, self._inputs = None, ()
        return self._result  # type: ignore[return-value]  # finish has set it
