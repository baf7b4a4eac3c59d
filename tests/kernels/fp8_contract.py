"""What every implementation of attend keeps on fp8 inputs: cases, and a comparison with fp64 on what they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringfa3_kernels import Partial, Quantized, Visible, attend, dequantize, quantize
from tests.kernels.contract import Case, Sight, causal, documents, full, ragged, window
from tests.kernels.oracle import Answer, Unlucky, assert_close, plain

# In which precision the yardstick, plain PyTorch attention, reads what fp8 stands for: `portable` widens to fp16
YARDSTICK = {"reference": torch.float32, "aten": torch.float32, "portable": torch.float16}

CASES = (
    Case("full", 130, 200, full, D=64, cuts=(128,)),
    Case("one key and one row", 1, 1, full, D=40),
    Case("one row", 1, 300, full, Hq=2, Hkv=1, D=64, cuts=(128, 256)),
    Case("causal, GQA 4", 150, 150, causal, Hq=4, Hkv=1, D=32, cuts=(128,)),
    Case("causal, fewer keys", 140, 60, causal, D=16),
    Case("window", 200, 270, window(40, 3), Hkv=1, D=32, cuts=(128, 256)),
    Case("documents", 160, 160, documents(50, 1, 79, 30), D=16, cuts=(128,)),
    Case("ragged, softcap", 140, 150, ragged, B=2, Hq=4, Hkv=2, D=24, softcap=2.0, scale=0.7, cuts=(128,)),
    Case("scale below 0", 50, 140, full, scale=-0.3, D=32),
    Case("scale 0", 20, 130, full, scale=0.0),
    Case("head_dim 128", 70, 140, causal, D=128, cuts=(128,)),
    Case("head_dim 256", 33, 40, causal, D=256),
)


@dataclass(frozen=True)
class Fp8Inputs:
    """The tensors of a case, drawn anew in every run: normal numbers whose size differs from block to block."""

    case: Case
    q: Quantized
    k: Quantized
    v: Quantized
    visible: Visible

    @classmethod
    def draw(
        cls, case: Case, device: str, generator: torch.Generator, *, block: int = 128, dtype: torch.dtype, rotate: bool
    ) -> Fp8Inputs:
        def draw(S: int, H: int) -> Tensor:
            size = 2.0 ** torch.randint(-2, 2, (case.B, -(-S // 128), H, 1), generator=generator)
            x = torch.randn(case.B, S, H, case.D, generator=generator)
            return (x * size.repeat_interleave(128, 1)[:, :S]).to(device)

        q, k, v = draw(case.Sq, case.Hq), draw(case.Sk, case.Hkv), draw(case.Sk, case.Hkv)
        q, k = q / 2, k / 2  # scores near 1: a softmax of one key would leave P nothing to round
        made = quantize(q, k, v, block=block, dtype=dtype, rotate=rotate and case.D & (case.D - 1) == 0)
        return cls(case, *made, case.sight(case, generator).to(device))

    def plain(self, dtype: torch.dtype) -> Answer:
        """Plain PyTorch attention in `dtype` on what the fp8 tensors stand for."""
        q, k, v = (dequantize(x, torch.float64) for x in (self.q, self.k, self.v))
        dlse = torch.zeros(self.case.B, self.case.Hq, self.case.Sq, device=q.device)
        mask = self.visible.mask(self.case.Sk).expand(self.case.B, -1, -1)
        options = {"scale": self.case.scale, "softcap": self.case.softcap}
        return plain(q, k, v, torch.zeros_like(q), dlse, mask, dtype=dtype, **options)  # type: ignore[arg-type]


def check(impl: str, inputs_of: Fp8Inputs) -> None:
    """One call, in every out_dtype, and the same in shards of keys that continue each other.

    Raises:
        Unlucky: errors just above the rule.
        AssertionError: errors far above it.
    """
    inputs, case = inputs_of, inputs_of.case
    truth, yardstick = inputs.plain(torch.float64), inputs.plain(YARDSTICK[impl])
    options = {"scale": case.scale, "softcap": case.softcap, "impl": impl}
    whole = attend(inputs.q, inputs.k, inputs.v, inputs.visible, **options)  # type: ignore[arg-type]
    assert whole.out.dtype == whole.lse.dtype == torch.float32
    assert_close("out", whole.out, truth.out, yardstick.out, YARDSTICK[impl])
    assert_close("lse", whole.lse, truth.lse, yardstick.lse, YARDSTICK[impl])
    dtype = torch.bfloat16 if inputs.q.data.dtype == torch.float8_e4m3fn else torch.float16
    narrow = attend(inputs.q, inputs.k, inputs.v, inputs.visible, out_dtype=dtype, **options)  # type: ignore[arg-type]
    assert narrow.out.dtype == dtype
    torch.testing.assert_close(narrow.out.float(), whole.out, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(narrow.lse, whole.lse)
    B, Sq, Hq, D = inputs.q.shape
    device = inputs.q.device
    state = Partial(torch.zeros(B, Sq, Hq, D, device=device), torch.full((B, Hq, Sq), -torch.inf, device=device))
    for start, stop in itertools.pairwise((0, *case.cuts, case.Sk)):
        lo, hi = ((x - start).clamp(0, stop - start) for x in (inputs.visible.lo, inputs.visible.hi))
        shard = inputs.k.rows(start, stop), inputs.v.rows(start, stop)
        result = attend(inputs.q, *shard, Visible(lo, hi), into=state, **options)  # type: ignore[arg-type]
        assert result.out is state.out
        assert result.lse is state.lse
    assert_close("out of shards", state.out, truth.out, yardstick.out, YARDSTICK[impl])
    assert_close("lse of shards", state.lse, truth.lse, yardstick.lse, YARDSTICK[impl])


def check_case(
    impl: str, case: Case, device: str, generator: torch.Generator, *, block: int, dtype: torch.dtype, rotate: bool
) -> None:
    """`check` on fresh numbers; errors just above the rule count once three draws in a row show them."""
    for draws_left in (2, 1, 0):
        try:
            return check(impl, Fp8Inputs.draw(case, device, generator, block=block, dtype=dtype, rotate=rotate))
        except Unlucky:
            if not draws_left:
                raise


def check_special(
    impl: str, device: str, generator: torch.Generator, sights: Sequence[Sight] = (full, causal, window(40, 0))
) -> None:
    """A NaN or an infinity in q, k or v reaches exactly the rows that see it: all of out and lse there."""
    for sight in sights:
        case = Case("", 150, 150, sight, B=2, Hq=2, Hkv=1, D=32)
        q, k, v = (torch.randn(2, 150, H, 32, generator=generator) for H in (2, 1, 1))
        k[0, 130, 0, 3], v[1, 30, 0, 5], q[0, 149, 1, 0] = torch.nan, -torch.inf, torch.inf
        v[1, 140, 0, :] = torch.nan
        visible = case.sight(case, generator).to(device)
        result = attend(*quantize(*(x.to(device) for x in (q, k, v)), rotate=True), visible, impl=impl)
        sees = visible.mask(150)
        wanted = torch.zeros(2, 2, 150, dtype=torch.bool, device=device)
        wanted[0] = sees[:, 130]
        wanted[1] = sees[:, 30] | sees[:, 140]
        wanted[0, 1, 149] = True
        assert torch.equal(result.lse.isnan(), wanted), sight
        assert torch.equal(result.out.isnan(), wanted.transpose(1, 2)[..., None].expand_as(result.out)), sight
        assert result.out[~result.out.isnan()].isfinite().all()
