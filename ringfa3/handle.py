"""The handle of a call made with async_op=True."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ringfa3.lane import Started, Tensors

T = TypeVar("T")


class Handle(Generic[T]):
    """A call under way. Until `wait`, leave q, k and v as they are; between them, do what you like.

    The arguments were checked, and all ranks agreed on them, when the call was made; what goes wrong later (RankFailed)
    is raised by `wait`. Where gradients are wanted, `wait` is the operation that autograd sees.
    """

    def __init__(
        self,
        started: Started,
        inputs: Sequence[Tensor],
        finish: Callable[[Tensors], T],
        before: Handle[Any] | None = None,
    ) -> None:
        self._started, self._inputs, self._before = started, inputs, before
        self._versions = [_version(x) for x in inputs]
        self._finish: Callable[[Tensors], T] | None = finish
        self._grad = torch.is_grad_enabled()
        self._result: T | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether `wait` would return without waiting. Does not say whether the call went well."""
        return self._finish is None or self._started.done()

    def wait(self) -> T:
        """The call's result; the same one whenever asked. On CUDA the current stream waits, not the host.

        Handles may be waited for in any order: calls made before this one are finished first, so that autograd meets
        the calls of a group in the same order on every rank.

        Raises:
            RankFailed: another rank died or stopped.
            RuntimeError: q, k or v was written to meanwhile: the result may have been computed from either.
        """
        self._complete()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # finish has set it

    def _complete(self) -> None:
        """Finish the calls made before, then this one; an error is kept for its own `wait`."""
        waiting: list[Handle[Any]] = []
        latest: Handle[Any] | None = self
        while latest is not None and latest._finish is not None:  # a loop: there may be thousands
            waiting.append(latest)
            latest = latest._before
        for handle in reversed(waiting):
            handle._end()

    def _end(self) -> None:
        """Finish this call, those made before having been finished."""
        finish, self._finish, self._before = self._finish, None, None
        assert finish is not None
        try:
            result = self._started.result()
            for name, x, version in zip("qkv", self._inputs, self._versions, strict=True):
                if _version(x) != version:
                    writes = _version(x) - version
                    raise RuntimeError(f"{name}: wanted it untouched until wait(), got {writes} writes to it")
            with torch.set_grad_enabled(self._grad):
                self._result = finish(result)
        except Exception as error:
            self._error = error
        except BaseException as error:  # Ctrl-C while it waited: nobody knows what became of the call
            self._error = error
            raise
        self._inputs = ()


def _version(x: Tensor) -> int:
    """How often x was written to; 0 for inference tensors, which do not count."""
    return 0 if x.is_inference() else x._version
