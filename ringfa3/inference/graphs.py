"""Decode steps as CUDA graphs: one for each form (batch, tokens, blocks, padded to powers of 2), captured on first use.

A model's step launches a thousand small kernels, which takes the host longer than the device; a replayed graph is one
launch. Everything that changes from step to step is in one buffer of fixed address (`Form`), which the host fills.
Every rank captures and replays the same graphs in the same order, as they hold the all-gathers of Partials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringfa3.inference.attend import Decode
from ringfa3.inference.cache import PagedCache
from ringfa3.inference.model import Paged
from ringfa3.inference.newest import Form, Newest
from ringfa3.inference.ranks import Ranks


class Graphs:
    """Decode steps of one model over one cache on a GPU.

    Args:
        model, cache, ranks, impl: as `Decode` and `Runner` have them.

    Raises:
        ValueError: the cache is not on a GPU.
    """

    def __init__(self, model: Paged, cache: PagedCache, ranks: Ranks, *, impl: str = "auto") -> None:
        if cache.k.device.type != "cuda":
            raise ValueError(f"graphs: wanted False on {cache.k.device}, CUDA graphs need a GPU, got True")
        self._model, self._cache, self._ranks, self._impl = model, cache, ranks, impl
        self._captured: dict[Form, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, ids: NDArray[np.int64], newest: Newest) -> Tensor:
        """fp32 logits [B, n, vocab]; overwritten by the next step of this form."""
        form = Form.of(newest, padded=True)
        sent = form.pack(ids, newest, self._cache.scratch, pinned=True)
        captured = self._captured.get(form)
        if captured is None:
            captured = self._captured[form] = self._capture(form, sent.to(self._cache.k.device))
        else:
            captured.buffer.copy_(sent, non_blocking=True)
            captured.graph.replay()
        return captured.logits[: ids.shape[0]]

    def _capture(self, form: Form, buffer: Tensor) -> _Captured:
        """The step is run once before (kernels are compiled and libraries make their buffers) and once after."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(form, buffer)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (the watch, NCCL's) go on asking for events meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._step(form, buffer)
        graph.replay()
        return _Captured(graph, buffer, logits)

    def _step(self, form: Form, buffer: Tensor) -> Tensor:
        sent = form.unpack(buffer)
        step = Decode(self._cache, self._ranks, sent, impl=self._impl)
        return self._model(step, sent.ids, sent.positions)


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph, the buffer that it reads, and the logits that it writes."""

    graph: torch.cuda.CUDAGraph
    buffer: Tensor
    logits: Tensor
