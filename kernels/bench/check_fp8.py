"""Combinations of the fp8 forward's flags against fp64: fresh random inputs, poisoned outputs, guarded margins.

The rule: on the numbers that the fp8 tensors stand for, at most twice the error of the kernel's twin in torch, which
rounds P as the kernel does and adds in fp32 (fp8_twin.py). `isolate` takes the kernel apart where that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import check_attend
import torch
from check_attend import Check, _guarded
from torch import Tensor

from ringfa3_kernels import hopper, reference
from ringfa3_kernels.hopper import fp8_configs, fp8_launch, fp8_twin, launch, schedule
from ringfa3_kernels.quantized import BLOCK, Quantized, dequantize, padded, quantize
from ringfa3_kernels.types import Partial, Visible

FLOOR = 1e-4  # of the largest output: where P happens to be exact
# of a logit: wgmma on fp8 keeps some 13 bits of the sum that q.k is, before it is scaled
LSE = 2.0**-11
Three = tuple[Quantized, Quantized, Quantized]


@dataclass(frozen=True)
class Fp8Check:
    """A Check (its dtype is what is quantised), how it is quantised, and fields of the table's tile to change."""

    call: Check
    block: int = BLOCK
    rotate: bool = False
    change: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Its tokens, for --only."""
        words = [self.call.name.replace("bfloat16", "fp8"), *(f"{k}={v}" for k, v in self.change)]
        return " ".join(words + ["per-head"] * (self.block == 0) + ["rotated"] * self.rotate)


def table(*, quick: bool) -> list[Fp8Check]:
    """What compiles to different kernels, and the shapes that have edges."""
    masks = ("full", "causal", "documents")
    calls = [Check(m, D, wide=w) for D, m, w in product((128, 64), masks, (False, True))]
    calls += [Check(m, D, Sq=768, Sk=768) for D, m in product((128, 64), ("full", "causal"))]
    calls += [Check("documents", D, shards=3, wide=w) for D, w in product((128, 64), (False, True))]
    calls += [
        Check("full", shards=2, wide=True),
        Check("causal", softcap=15.0),
        Check("causal", softcap=15.0, scale=-0.1),
    ]
    calls += [
        Check("full", Sq=1, Sk=1, B=1),
        Check("full", Sq=1, Sk=129),
        Check("causal", Sq=1, Sk=77),
        Check("full", Sq=129, Sk=1, wide=True),
        Check("causal", Sq=640, Sk=896),
        Check("causal", Sq=896, Sk=640),
        Check("full", Hq=8, Hkv=1, Sq=5, Sk=2000),
        Check("causal", Hq=6, Hkv=2, Sq=9, Sk=1000, wide=True),
        Check("causal", Hq=16, Sq=1200, Sk=1200),
        Check("full", Hq=16, Sq=1280, Sk=1280),
        Check("full", scale=0.0),
        Check("full", scale=-0.1),
        Check("causal", size=8.0, Sq=768, Sk=768),
    ]
    calls += [Check(m, wide=True) for m in ("window", "narrow", "empty", "batched")]
    calls += [Check("empty", shards=2, wide=True), Check("causal", 80), Check("full", 112, wide=True)]
    found = [Fp8Check(c) for c in calls]
    found += [Fp8Check(Check(m), block=0) for m in masks] + [Fp8Check(Check("causal"), rotate=True)]
    for change in (
        {"TWO_LEVEL": False, "K_LATE": False},
        {"TWO_LEVEL": False, "LAZY": 4},
        {"PINGPONG": True},
        {"V_LATE": True},
        {"STAGES": 3},
    ):
        found += [Fp8Check(Check(m, Hq=16, Sq=1280, Sk=1280), change=tuple(change.items())) for m in ("full", "causal")]
    if quick:
        return found
    found += [Fp8Check(Check(m, D)) for D, m in product((16, 48, 80, 96, 112), ("causal", "documents"))]
    found += [Fp8Check(Check("full", D, shards=4, wide=w)) for D, w in product((64, 128), (False, True))]
    found += [Fp8Check(replace(c.call, layout="BHSD")) for c in found[:6]]
    return found


def quantized(check: Fp8Check, q: Tensor, k: Tensor, v: Tensor) -> Three:
    """The check's inputs in fp8."""
    return quantize(q, k, v, block=check.block, rotate=check.rotate, v_order="keys")


def run(checks: Sequence[Fp8Check]) -> bool:
    """Print one line a check; True if all are right."""
    wrong = 0
    print(f"{'':96} error/twin  max/twin  lse")
    for check in checks:
        figures, complaint = measure(check)
        wrong += bool(complaint)
        print(f"{check.name:96} {figures}  {complaint and 'FAIL ' + complaint}".rstrip(), flush=True)
    for name, fn in SPECIAL.items():
        complaint = fn()
        wrong += bool(complaint)
        print(f"{name:96} {'FAIL ' + complaint if complaint else 'ok'}", flush=True)
    print(f"{len(checks) + len(SPECIAL) - wrong} right, {wrong} wrong", flush=True)
    return wrong == 0


def compiled(check: Fp8Check) -> str:
    """Compile a check's kernels into Triton's cache, in a process of its own; an error's message, or nothing."""
    try:
        ours(check, quantized(check, *check_attend.inputs(check.call)), compile_only=True)
    except Exception as error:  # reported by name; the check itself then fails
        return f"  {check.name}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def ours(check: Fp8Check, qkv: Three, *, compile_only: bool = False) -> tuple[Partial, str]:
    """Our result, shard after shard, in guarded memory; and what was written where nothing may be."""
    call, (q, k, v) = check.call, qkv
    whole = check_attend.visible(call)
    state = _guarded(call, torch.float32)
    step = padded(-(-call.Sk // call.shards))
    complaint, result = "", state[0]
    for begin in range(0, call.Sk, step):
        end = min(begin + step, call.Sk)
        into = state[0] if begin else None
        wide = call.wide or end < call.Sk
        guarded = state if wide else _guarded(call, call.dtype)
        result = guarded[0] if wide or not begin else Partial(guarded[0].out, state[0].lse)
        one = fp8_launch.prepare(
            q,
            k.rows(begin, end),
            v.rows(begin, end),
            whole if call.shards == 1 else _part(whole, call, begin, end),
            result,
            into,
            scale=_scale(call),
            softcap=call.softcap,
            counter=torch.zeros(2, dtype=torch.int32, device="cuda"),
            sms=schedule.multiprocessors(q.device),
            tile=_tile(check, whole),
        )
        if compile_only:
            one.warmup()
            continue
        one.run()
        complaint = complaint or guarded[1]() or state[1]()
    return result, complaint


def _part(whole: Visible, call: Check, begin: int, end: int) -> Visible:
    if call.mask == "full":
        return Visible.full(call.Sq, end - begin, "cuda")
    return Visible(*((x - begin).clamp(0, end - begin) for x in (whole.lo, whole.hi)))


def _tile(check: Fp8Check, visible: Visible) -> fp8_configs.Fp8Config | None:
    if not check.change:
        return None
    return replace(fp8_configs.TABLE[check.call.D, launch.MASKS[visible.kind]], **dict(check.change))


def _scale(call: Check) -> float:
    return call.D**-0.5 if call.scale is None else call.scale


def measure(check: Fp8Check) -> tuple[str, str]:
    """Ratios of our errors to the twin's, the error of lse, and what is wrong (nothing, if all is right)."""
    call = check.call
    qkv = quantized(check, *check_attend.inputs(call))
    result, complaint = ours(check, qkv)
    mask = check_attend.visible(call)
    wide = [dequantize(x, torch.float64) for x in qkv]
    options: dict[str, Any] = {"scale": _scale(call), "softcap": call.softcap, "into": None}
    exact = reference.attend(*wide, mask, out_dtype=torch.float64, **options)
    twin = fp8_twin.attend(*qkv, mask, lazy=dict(check.change).get("LAZY", 0), **options)
    if call.shards == 1 and not check.change:
        dtype = torch.float32 if call.wide else call.dtype
        door = hopper.attend_quantized(*qkv, mask, out_dtype=dtype, **options)
        if not (torch.equal(door.out, result.out) and torch.equal(door.lse, result.lse)):
            complaint = complaint or "attend() differs from the launch in guarded memory"
    seen = exact.lse != -torch.inf
    if bool((result.lse == -torch.inf).ne(~seen).any()):
        complaint = complaint or "lse is -inf in other rows than it should be"
    if bool(result.out.transpose(1, 2)[~seen].ne(0).any()) or bool(result.out.isnan().any()):
        complaint = complaint or "empty rows are not 0, or NaN"
    error, allowed = ((x.out.double() - exact.out) for x in (result, twin))
    rounding = 0.0 if call.wide else 2.0**-9  # of the output to 16 bits
    top = exact.out.abs().max().item() * (FLOOR + rounding) + 1e-12
    ratios = [
        error.norm().item() / (allowed.norm().item() + top * error.numel() ** 0.5),
        error.abs().max().item() / (2 * allowed.abs().max().item() + top),
    ]
    lse = (result.lse.double() - exact.lse)[seen].abs().max().item() if seen.any() else 0.0
    logits = _largest_logit(wide, _scale(call), call.softcap)
    if not (max(ratios) <= 2.0 and lse <= LSE * max(1.0, logits)):
        complaint = complaint or f"more than twice the twin's error, or lse off (logits up to {logits:.1f})"
    return f"{ratios[0]:9.2f}  {ratios[1]:9.2f}  {lse:.1e}", complaint


def _largest_logit(wide: Sequence[Tensor], scale: float, softcap: float) -> float:
    """An upper bound on |score|: the product of the longest rows of q and k."""
    longest = [x.norm(dim=-1).max().item() for x in wide[:2]]
    logit = abs(scale) * longest[0] * longest[1]
    return min(logit, softcap) if softcap else logit


SPECIAL: dict[str, Callable[[], str]] = {}


def special(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a check that is not a shape; it returns what is wrong, or nothing."""

    def register(fn: Callable[[], str]) -> Callable[[], str]:
        SPECIAL[name] = fn
        return fn

    return register


@special("NaN in a key, infinity in a value: the rows that see them, and no others")
def _nan() -> str:
    q, k, v = (torch.randn(2, 700, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[1, 300, 2, 5] = torch.nan
    v[0, 450, 1, 7] = torch.inf
    made = quantize(q, k, v, v_order="keys")
    got = hopper.attend_quantized(
        *made, Visible.causal(700, 700, "cuda"), scale=0.1, softcap=0.0, into=None, out_dtype=torch.bfloat16
    )
    bad = torch.zeros(2, 700, 4, dtype=torch.bool, device="cuda")
    bad[1, 300:, 2] = bad[0, 450:, 1] = True
    if not got.out.isnan().equal(bad[..., None].expand_as(got.out)):
        return "NaN in other rows of out than see it"
    return "" if got.lse.isnan().equal(bad.transpose(1, 2)) else "NaN in other rows of lse than see it"


@special("two streams at once")
def _streams() -> str:
    mask = Visible.causal(2048, 2048, "cuda")
    inputs = [[torch.randn(2, 2048, 8, 128, device="cuda") for _ in range(3)] for _ in range(2)]
    jobs = [quantize(q, k, v, v_order="keys") for q, k, v in inputs]
    options: dict[str, Any] = {"scale": 0.1, "softcap": 0.0, "into": None, "out_dtype": torch.bfloat16}
    alone = [hopper.attend_quantized(*job, mask, **options) for job in jobs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in jobs]
    found: list[list[Partial]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(hopper.attend_quantized(*jobs[i], mask, **options))
    torch.cuda.synchronize()
    same = all(torch.equal(x.out, alone[i].out) and torch.equal(x.lse, alone[i].lse) for i in (0, 1) for x in found[i])
    return "" if same else "results differ from those of one stream"


@special("NaN in a row of q, continued over two shards: that row, and no others")  # the last: it could hang
def _nan_row() -> str:
    q, k, v = (torch.randn(1, 512, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q[0, 5, 0, 0] = torch.nan
    queries, keys, values = quantize(q, k, v, v_order="keys")
    state = None
    for begin in (0, 256):
        shard = keys.rows(begin, begin + 256), values.rows(begin, begin + 256)
        state = hopper.attend_quantized(
            queries, *shard, Visible.full(512, 256, "cuda"), scale=0.1, softcap=0.0, into=state, out_dtype=torch.float32
        )
    assert state is not None
    bad = torch.zeros(1, 512, 4, dtype=torch.bool, device="cuda")
    bad[0, 5, 0] = True
    fine = state.out.isnan().equal(bad[..., None].expand_as(state.out)) and state.lse.isnan().equal(bad.transpose(1, 2))
    return "" if fine else "NaN in other rows than the one that has it"


def isolate() -> None:
    """Take the kernel apart: each line tests one more piece than those before, so that the first wrong one names it."""
    for D in (128, 64):
        for name, fn in PIECES.items():
            torch.cuda.synchronize()
            print(f"D {D:3}  {name:76} {fn(D)}", flush=True)


def _eye(D: int, S: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Row i of q fits key i alone; the values spell the key's number in bits."""
    rows = torch.eye(max(S, D), device="cuda")[:S, :D] if S <= D else _distinct(S, D)
    bits = ((torch.arange(S, device="cuda")[:, None] >> torch.arange(D, device="cuda").clamp(max=30)) & 1).float()
    return (rows * 30)[None, :, None], rows[None, :, None], bits[None, :, None]


def _distinct(S: int, D: int) -> Tensor:
    """Rows of length 1 whose products with each other are far from 1: random signs."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    return (torch.randint(0, 2, (S, D), device="cuda", generator=generator) * 2 - 1) * D**-0.5


def _call(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, mask: Visible | None = None) -> tuple[Three, Partial]:
    made = quantize(q, k, v, v_order="keys")
    visible = mask or Visible.full(q.shape[1], k.shape[1], "cuda")
    got = hopper.attend_quantized(*made, visible, scale=scale, softcap=0.0, into=None, out_dtype=torch.float32)
    torch.cuda.synchronize()
    return made, got


def _lse_of(D: int, S: int) -> str:
    q, k = (torch.randn(1, S, 2, D, device="cuda") for _ in range(2))
    made, got = _call(q, k, k, D**-0.5)
    wide = [dequantize(x, torch.float64) for x in made]
    exact = torch.einsum("bihd,bjhd->bhij", wide[0], wide[1]).mul(D**-0.5).logsumexp(-1)
    return f"lse off by {(got.lse - exact).abs().max():.1e}"


def _order(D: int) -> str:
    """Which key's value comes out where key i's should."""
    _, got = _call(*_eye(D), scale=8.0)
    bits = (got.out[0, :, 0, :7] > 0.5).long()
    found = (bits << torch.arange(7, device="cuda")).sum(-1).tolist()
    wrong = {i: j for i, j in enumerate(found) if i != j}
    return (
        f"row: key whose value it gets {dict(list(wrong.items())[:16])}" if wrong else "every row gets its key's value"
    )


def _mean(D: int, S: int, spread: int) -> str:
    """Scores 0: out is the mean of v, whose blocks differ in scale by up to 2^spread."""
    v = torch.randn(1, S, 2, D, device="cuda")
    v *= (2.0 ** -(torch.arange(S, device="cuda") // 128 % (spread + 1)))[None, :, None, None]
    made, got = _call(torch.zeros(1, 128, 2, D, device="cuda"), torch.zeros_like(v), v)
    exact = dequantize(made[2], torch.float64).mean(1, keepdim=True)
    lse = (got.lse - math.log(S)).abs().max()
    return f"out off by {(got.out - exact).abs().max() / exact.abs().max():.1e} of the largest, lse by {lse:.1e}"


PIECES: dict[str, Callable[[int], str]] = {
    "launches, one block: lse is log 128, out is the mean of v": lambda D: _mean(D, 128, 0),
    "Q K^T and its scales, one block: lse": lambda D: _lse_of(D, 128),
    "Q K^T and its scales, 16 blocks (stages wrap): lse": lambda D: _lse_of(D, 2048),
    "Q K^T, tail of 77 keys: lse": lambda D: _lse_of(D, 77),
    "order of keys in V against P's registers": _order,
    "P V over 16 blocks of one scale": lambda D: _mean(D, 2048, 0),
    "P V over 16 blocks whose scales differ": lambda D: _mean(D, 2048, 5),
    "P V, tail of 77 keys": lambda D: _mean(D, 77, 0),
}
