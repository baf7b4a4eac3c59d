"""context_parallel on two GPUs, over NCCL: loss and gradients equal one process's on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ring.test_context_parallel import step

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks, callers")]  # one world, so one process


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_packed_documents_with_masked_labels(gpu_world: Any, name: str, wrapper: str) -> None:
    """In fp32; looser than on CPUs: other kernels, other order of sums."""
    for loss, wanted, difference in gpu_world(2)(step, name, 1, "packed", wrapper, {"device": "cuda"}):
        assert loss == pytest.approx(wanted, rel=1e-4)
        assert difference < 1e-3
