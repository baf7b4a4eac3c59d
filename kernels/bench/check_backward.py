"""Every combination of the backward's flags against fp64: fresh random inputs, poisoned outputs, guarded margins.

The rule: root mean square error at most twice that of plain PyTorch attention and autograd in the same input precision,
largest at most ten times, plus a tiny floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import check_attend
import torch
from check_attend import MARGIN, NAN, Check
from torch import Tensor

from ringfa3_kernels import hopper, row_delta
from ringfa3_kernels.hopper import backward_launch
from ringfa3_kernels.hopper.configs import BackwardConfig
from ringfa3_kernels.types import Visible

FLOOR = 4e-6  # of the largest gradient


@dataclass(frozen=True)
class BackwardCheck(Check):
    """One call to be checked: as Check, where `wide` means fp32 gradients.

    Args:
        add: accumulate into gradients that hold random numbers (fp32).
        deterministic: asked for, and run twice: the bits must be the same.
        dlse: lse has a gradient too.
    """

    add: bool = False
    deterministic: bool = False
    dlse: bool = False

    @property
    def title(self) -> str:
        """Its tokens, for --only."""
        words = [self.name.replace("check ", "backward ").replace("fp32-out", "fp32")]
        words += ["added"] * self.add + ["deterministic"] * self.deterministic + ["dlse"] * self.dlse
        return " ".join(words)


def table(*, quick: bool) -> list[BackwardCheck]:
    """All combinations that compile to different kernels, and the shapes that have edges."""
    C = BackwardCheck
    half = torch.float16
    masks = ("full", "causal", "documents")
    found = [C(m, D, Sq=768, Sk=768) for D, m in product((128, 64, 256), masks)]
    found += [C(m, D) for D, m in product((128, 64, 256), ("full", "causal", "documents", "window"))]
    found += [C(m, D, add=True, wide=True, dlse=True) for D, m in product((128, 64, 256), masks)]
    found += [C(m, wide=True) for m in ("full", "sym", "prefix", "empty", "batched")]
    found += [C(m, D, deterministic=True, wide=m == "full", add=m == "full") for D, m in product((128, 64, 256), masks)]
    found += [C(m, dtype=half) for m in masks] + [C("causal", D, dtype=half, add=True, wide=True) for D in (64, 256)]
    found += [C("causal", Sq=640, Sk=896), C("causal", Sq=896, Sk=640), C("causal", 64, Sq=130, Sk=900)]
    found += [C("causal", Hq=6, Hkv=1), C("documents", Hq=8, Hkv=8, B=1), C("full", Hq=12, Hkv=4, Sq=300, Sk=900)]
    found += [
        C(m, D, softcap=15.0, dtype=t)
        for m, D, t in (
            ("causal", 128, torch.bfloat16),
            ("full", 128, half),
            ("documents", 64, half),
            ("causal", 64, torch.bfloat16),
            ("causal", 256, torch.bfloat16),
        )
    ]
    found += [C("full", scale=s) for s in (0.0, -0.1, 0.3)] + [C("documents", scale=0.0), C("causal", scale=-0.2)]
    if quick:
        return found
    found += [C(m, D) for D, m in product((8, 40, 80, 96, 112, 136, 192), ("causal", "documents"))]
    found += [C("window", D, add=True, wide=True) for D in (24, 72, 160, 248)]
    found += [C(m, D, layout=x) for m, D, x in product(("full", "documents"), (64, 128, 256), ("BHSD", "slice"))]
    found += [C("causal", D, size=8.0, Sq=s, Sk=s) for D, s in product((64, 128, 256), (768, 1000))]
    found += [C("full", Sq=1, Sk=1, B=1), C("causal", Sq=1, Sk=129), C("full", Sq=129, Sk=1, wide=True)]
    found += [C("full", Hq=5, Hkv=5, B=3, Sq=300, Sk=257), C("documents", Hq=16, Hkv=1, B=1, Sq=1500, Sk=1500)]
    return found


SPECIAL: dict[str, Callable[[], str]] = {}


def special(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a check that is not a shape; it returns what is wrong, or nothing."""

    def register(fn: Callable[[], str]) -> Callable[[], str]:
        SPECIAL[name] = fn
        return fn

    return register


def run(checks: Sequence[BackwardCheck], tile: BackwardConfig | None = None, *, extras: bool = True) -> bool:
    """Print one line a check: error ratios to plain PyTorch's (root mean square / largest); True if all are right."""
    wrong = 0
    print(f"{'':84}  dq           dk           dv")
    special_checks = SPECIAL if extras else {}
    for check in checks:
        try:
            ratios, complaint = measure(check, tile)
        except Exception as error:  # the others still run
            ratios, complaint = "", f"{type(error).__name__}: {str(error)[:300]}"
        wrong += bool(complaint)
        print(f"{'FAIL' if complaint else 'PASS'} {check.title:80} {ratios}  {complaint}".rstrip(), flush=True)
    for name, fn in special_checks.items():
        try:
            complaint = fn()
        except Exception as error:  # the others still run
            complaint = f"{type(error).__name__}: {str(error)[:300]}"
        wrong += bool(complaint)
        print(f"{'FAIL' if complaint else 'PASS'} {name:80} {complaint}".rstrip(), flush=True)
    print(f"{len(checks) + len(special_checks) - wrong} right, {wrong} wrong", flush=True)
    return wrong == 0


@dataclass(frozen=True)
class Exact:
    """Attention by autograd: gradients, and what the backward is given of the forward."""

    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, Tensor, Tensor]


def by_autograd(check: BackwardCheck, tensors: Sequence[Tensor], dlse: Tensor, dtype: torch.dtype) -> Exact:
    """q, k, v, dout -> gradients of sum(out * dout) + sum(lse * dlse) in `dtype`, softmax in fp32 or wider."""
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in tensors[:3])
    wide = torch.promote_types(dtype, torch.float32)
    group = check.Hq // check.Hkv
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)).to(wide) * _scale(check)
    if check.softcap:
        s = check.softcap * torch.tanh(s / check.softcap)
    mask = check_attend.visible(check).mask(check.Sk)
    mask = mask[:, None] if mask.ndim == 3 else mask
    seen = mask.any(-1)
    s = s.masked_fill(~mask, -torch.inf).masked_fill(~seen[..., None], 0.0)
    p = s.softmax(-1) * seen[..., None]
    out = torch.einsum("bhij,bjhd->bihd", p.to(dtype), v.repeat_interleave(group, 2))
    lse = s.logsumexp(-1)
    ((out * tensors[3].to(dtype)).to(wide).sum() + (lse * dlse.to(wide) * seen).sum()).backward()
    lse = lse.detach().masked_fill(~seen.expand_as(lse), -torch.inf)
    assert q.grad is not None and k.grad is not None and v.grad is not None  # noqa: PT018
    return Exact(out.detach(), lse, (q.grad, k.grad, v.grad))


def measure(check: BackwardCheck, tile: BackwardConfig | None = None) -> tuple[str, str]:
    """Ratios of our errors to plain PyTorch's, and what is wrong (nothing, if all is right)."""
    q, k, v = check_attend.inputs(check)
    dout = check_attend.inputs(replace(check, Sk=1, size=1.0))[0]
    dlse = torch.randn(check.B, check.Hq, check.Sq, device="cuda") * (0.3 if check.dlse else 0.0)
    exact = by_autograd(check, (q, k, v, dout), dlse, torch.float64)
    plain = by_autograd(check, (q, k, v, dout), dlse, check.dtype)
    lse = exact.lse.float()
    delta = row_delta(dout, exact.out.float(), dlse if check.dlse else None)
    fp64 = (exact.out * dout.double()).sum(-1).transpose(1, 2) - dlse.double()
    complaint = "" if (delta.double() - fp64).abs().max() < 1e-4 * (1 + fp64.abs().max()) else "row_delta is wrong"
    given = (dout, q, k, v, lse, delta)
    grads, before, found_outside = ours(check, given, tile)
    complaint = complaint or found_outside
    if check.deterministic:
        again, more, _ = ours(check, given, tile, before)
        if not all(torch.equal(x, y) for x, y in zip(grads, again, strict=True)):
            complaint = complaint or "not the same bits twice"
        del again, more
    ratios = []
    for name, got, start, true, simple in zip(("dq", "dk", "dv"), grads, before, exact.grads, plain.grads, strict=True):
        error = got.double() - (start.double() if check.add else 0.0) - true
        allowed = simple.double() - true
        if not bool(error.isfinite().all()):
            complaint = complaint or f"{name} is not finite in {int((~error.isfinite()).sum())} elements"
        floor = FLOOR * max(1.0, true.abs().max().item()) if check.wide else 1e-6 * true.abs().max().item() + 1e-12
        rms = _rms(error) / (_rms(allowed) + floor)
        top = error.abs().max().item() / (allowed.abs().max().item() + floor)
        ratios.append(f"{rms:5.2f}/{top:5.2f}")
        if not (rms <= 2.0 and top <= 10.0):
            complaint = complaint or f"{name}: more than twice plain PyTorch's error"
    return "  ".join(ratios), complaint


def ours(
    check: BackwardCheck,
    given: Sequence[Tensor],
    tile: BackwardConfig | None = None,
    before: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor], str]:
    """Our dq, dk, dv in guarded memory; what they held before; and what was written where nothing may be."""
    _, q, k, *_ = given
    dtype = torch.float32 if check.wide else check.dtype
    shapes = (q.shape, k.shape, k.shape)
    if before is None:
        before = [
            torch.randn(s, device="cuda") if check.add else torch.full(s, NAN, device="cuda", dtype=dtype)
            for s in shapes
        ]
    buffers = [torch.full((math.prod(s) + 2 * MARGIN,), NAN, device="cuda", dtype=dtype) for s in shapes]
    grads = [x[MARGIN:-MARGIN].view(s) for x, s in zip(buffers, shapes, strict=True)]
    for grad, start in zip(grads, before, strict=True):
        grad.copy_(start)
    call(check, given, check_attend.visible(check), grads, tile)
    clean = all(bool(x[:MARGIN].isnan().all() and x[-MARGIN:].isnan().all()) for x in buffers)
    return grads, list(before), "" if clean else "wrote outside its gradients"


def call(
    check: BackwardCheck,
    given: Sequence[Tensor],
    visible: Visible,
    grads: Sequence[Tensor],
    tile: BackwardConfig | None = None,
) -> None:
    """attend_backward as the check has it."""
    dout, q, k, v, lse, delta = given
    dq, dk, dv = grads
    backward_launch.attend_backward(
        dout, q, k, v, lse, delta, visible, dq=dq, dk=dk, dv=dv, accumulate=check.add, scale=_scale(check),
        softcap=check.softcap, deterministic=check.deterministic, tile=tile,
    )  # fmt: skip


def compiled(job: tuple[BackwardCheck, BackwardConfig | None]) -> str:
    """Compile a check's kernels into Triton's cache, in a process of its own; an error's message, or nothing."""
    check, tile = job
    try:
        q, k, v = check_attend.inputs(check)
        row = torch.empty(check.B, check.Hq, check.Sq, device="cuda")
        dtype = torch.float32 if check.wide else check.dtype
        dk = torch.empty(k.shape, device="cuda", dtype=dtype)
        backward_launch.prepare(
            q, q, k, v, row, row, check_attend.visible(check),
            dq=None if check.deterministic else torch.empty(q.shape, device="cuda"), dk=dk, dv=dk,
            accumulate=check.add, scale=_scale(check), softcap=check.softcap, tile=tile,
        ).warmup()  # fmt: skip
    except Exception as error:  # reported by name; the check itself then fails
        return f"  {check.title}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def _scale(check: Check) -> float:
    return check.D**-0.5 if check.scale is None else check.scale


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


Job = tuple[list[Tensor], Visible]


def _small(S: int = 2048, Hq: int = 8) -> Job:
    """dout, q, k, v, lse, delta of a causal call with what its forward gave."""
    dout, q, k, v = (torch.randn(2, S, Hq, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    mask = Visible.causal(S, S, "cuda")
    partial = hopper.attend(q, k, v, mask, scale=0.1, softcap=0.0, into=None, out_dtype=torch.bfloat16)
    return [dout, q, k, v, partial.lse, row_delta(dout, partial.out)], mask


def _backward(job: Job, *, deterministic: bool = False) -> list[Tensor]:
    given, mask = job
    grads = [torch.full_like(x, NAN) for x in given[1:4]]
    _call = BackwardCheck("causal", scale=0.1, deterministic=deterministic)
    call(_call, given, mask, grads)
    return grads


def _differ(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """dk and dv bitwise; dq, whose sums have no order, nearly."""
    same = all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
    return not same or not bool(((a[0] - b[0]).abs() <= 0.02 * b[0].abs() + 1e-3).all())


@special("two streams at once")
def _streams() -> str:
    jobs = [_small() for _ in range(2)]
    alone = [_backward(job) for job in jobs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in jobs]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(_backward(jobs[i]))
    torch.cuda.synchronize()
    wrong = any(_differ(x, alone[i]) for i in (0, 1) for x in found[i])
    return "results differ from those of one stream" if wrong else ""


@special("CUDA graph: captured, replayed on new inputs")
def _graph() -> str:
    job = _small()
    _backward(job)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _backward(job)
    fresh = _small()
    for x, y in zip(job[0], fresh[0], strict=True):
        x.copy_(y)
    graph.replay()
    expected = _backward(job)
    torch.cuda.synchronize()
    return "the replay differs from a plain call" if _differ(captured, expected) else ""


@special("deterministic: the same bits in 5 runs")
def _repeats() -> str:
    job = _small()
    first = _backward(job, deterministic=True)
    for _ in range(4):
        if not all(torch.equal(x, y) for x, y in zip(first, _backward(job, deterministic=True), strict=True)):
            return "the bits differ"
    return ""


@special("more than 2^31 elements (1.1M tokens, 16 heads, window)")
def _long() -> str:
    S, tail, window = 1_100_000, 512, 300
    dout, q, k, v = (torch.randn(1, S, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    causal = Visible.causal(S, S, "cuda")
    mask = Visible((causal.hi - window).clamp(min=0), causal.hi)
    partial = hopper.attend(q, k, v, mask, scale=0.1, softcap=0.0, into=None, out_dtype=torch.bfloat16)
    job = [dout, q, k, v, partial.lse, row_delta(dout, partial.out)], mask
    dq, dk, dv = _backward(job)
    keys = tail + window
    short = [x[:, -keys:].double() for x in (dout, q, k, v)]
    local = Visible((mask.lo[-keys:] - (S - keys)).clamp(min=0), mask.hi[-keys:] - (S - keys))
    wide = [x.requires_grad_() for x in short[1:]]
    s = torch.einsum("bihd,bjhd->bhij", wide[0], wide[1]) * 0.1
    p = s.masked_fill(~local.mask(keys), -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", p, wide[2])
    exact = torch.autograd.grad(out, wide, short[0])
    # rows before the tail see keys that the short call lacks; keys of the tail are seen by rows of the tail alone
    for name, got, true in zip(("dq", "dk", "dv"), (dq, dk, dv), exact, strict=True):
        error = (got[:, -tail:].double() - true[:, -tail:]).norm() / true[:, -tail:].norm()
        if not error < 1e-2:
            return f"{name}: error {error:.1e} in the last rows"
    return ""
