"""What a ring is made of, without the ring: its kernels hop by hop on local tensors, and one kernel for all hops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ringfa3_kernels import Partial, Visible, attend, attend_backward, row_delta
from ringfa3_kernels.door import state_dtype
from ringfa3_launch.bench.case import Case
from ringfa3_launch.bench.peers import Missing, Outputs
from ringfa3_launch.bench.shard import Shard


def hops(shard: Shard, case: Case, *, impl: str = "auto") -> Callable[[], Outputs]:
    """A call that runs this rank's attend calls one after another, as ring_attention does, with no transport.

    Keys and values have the shapes that the hops bring, and random contents. Backward there are row_delta and the
    attend_backward calls; zeroing, adding and casting gradients are the ring's, and not in it.
    """
    x, plan = shard.inputs, shard.plan
    q, k, v = (t.detach() for t in (x.q, x.k, x.v))
    keys: list[tuple[Tensor, Tensor]] = []
    for hop in plan.hops:
        if hop.source == plan.rank:
            keys.append((k[:, hop.keys], v[:, hop.keys]))
        else:
            both = torch.randn(2, 1, hop.keys.stop - hop.keys.start, case.Hkv, case.D, dtype=k.dtype, device=k.device)
            keys.append((both[0], both[1]))
    scale = case.D**-0.5

    def forward() -> Partial:
        state: Partial | None = None
        for number, (hop, (kh, vh)) in enumerate(zip(plan.hops, keys, strict=True), 1):
            out_dtype = q.dtype if number == len(keys) else None
            state = attend(q, kh, vh, hop.visible, scale=scale, into=state, out_dtype=out_dtype, impl=impl)
        return Partial.empty(q, q.dtype) if state is None else state

    if case.direction == "fwd":
        return lambda: (forward().out,)
    # alone, the gradients are stored in q's dtype; between hops they are fp32
    wide = q.dtype if plan.world == 1 else state_dtype(q.dtype)
    grads = [tuple(torch.zeros(t.shape, dtype=wide, device=t.device) for t in pair) for pair in keys]

    def forward_backward() -> Outputs:
        state = forward()
        delta = row_delta(x.dout, state.out)
        dq = torch.empty(q.shape, dtype=wide, device=q.device)
        for number, (hop, (kh, vh), (dk, dv)) in enumerate(zip(plan.hops, keys, grads, strict=True)):
            attend_backward(
                x.dout, q, kh, vh, state.lse, delta, hop.visible, dq=dq, dk=dk, dv=dv, accumulate=number > 0,
                scale=scale, impl=impl,
            )  # fmt: skip
        return state.out, dq

    return forward_backward


def one_launch(shard: Shard, case: Case, *, impl: str = "auto") -> Callable[[], Outputs]:
    """A call that attends to all keys of the sequence, lying here in the order of positions, in one launch.

    Raises:
        Missing: the case has a backward pass.
    """
    if case.direction != "fwd":
        raise Missing("one launch is compared forward only")
    q = shard.inputs.q.detach()
    positions = shard.plan.positions.cpu().numpy().astype(np.int64)
    lo, hi = (torch.from_numpy(x).to(q.device, torch.int32) for x in case.visible.bounds(positions, case.seqlen))
    visible = Visible(lo, hi)
    k, v = shard.keys()
    return lambda: (attend(q, k, v, visible, scale=case.D**-0.5, out_dtype=q.dtype, impl=impl).out,)
