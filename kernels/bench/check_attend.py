"""Every combination of the forward's flags against fp64: fresh random inputs, poisoned outputs, guarded margins.

The rule: at most twice the error of plain PyTorch attention in the same input precision, plus a tiny floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from ringfa3_kernels import hopper, reference
from ringfa3_kernels.hopper import launch, schedule
from ringfa3_kernels.types import Partial, Visible

FLOOR = 2e-5  # of the largest output: where plain PyTorch happens to be exact
LSE_FLOOR = 2e-5
NAN = float("nan")
MARGIN = 4096  # elements before and after an output that must stay as they were


@dataclass(frozen=True)
class Check:
    """One call to be checked.

    Args:
        mask: "full", "causal", "window", "narrow", "sym", "documents", "prefix", "empty", "batched".
        shards: key shards, each continuing the Partial of those before (1: a plain call).
        wide: out fp32 (with shards: after the last one too), else q's dtype.
        layout: "BSHD", "BHSD" (a transposed view) or "slice" (every other row of something longer).
        size: factor on q, to make the row maxima jump.
    """

    mask: str
    D: int = 128
    Hq: int = 4
    Hkv: int = 2
    Sq: int = 700
    Sk: int = 700
    B: int = 2
    dtype: torch.dtype = torch.bfloat16
    wide: bool = False
    softcap: float = 0.0
    shards: int = 1
    layout: str = "BSHD"
    size: float = 1.0
    scale: float | None = None
    extra: str = field(default="")

    @property
    def name(self) -> str:
        """Its tokens, for --only."""
        words = [f"check {self.mask} D{self.D} H{self.Hq}:{self.Hkv} Sq{self.Sq} Sk{self.Sk}", str(self.dtype)[6:]]
        words += ["fp32-out"] * self.wide + [f"softcap{self.softcap:g}"] * bool(self.softcap)
        words += [f"shards{self.shards}"] * (self.shards > 1) + [self.layout] * (self.layout != "BSHD")
        words += [f"q*{self.size:g}"] * (self.size != 1) + [f"scale{self.scale}"] * (self.scale is not None)
        return " ".join(words + [self.extra] * bool(self.extra))


def table(*, quick: bool) -> list[Check]:
    """All combinations that compile to different kernels, and the shapes that have edges."""
    half, wide = torch.float16, {"wide": True}
    found = [Check(m, D, wide=w) for D, m, w in product((64, 128, 256), ("full", "causal", "documents"), (False, True))]
    found += [
        Check(m, D, shards=3, wide=w) for D, m, w in product((64, 128, 256), ("full", "documents"), (False, True))
    ]
    # aligned causal has its own kernel; so has a full mask without a tail
    found += [Check(m, D, Sq=768, Sk=768) for D, m in product((64, 128, 256), ("full", "causal"))]
    found += [
        Check("causal", Sq=640, Sk=896),
        Check("causal", Sq=896, Sk=640, wide=True),
        Check("causal", 64, Sq=130, Sk=900),
    ]
    found += [Check(m, wide=True) for m in ("window", "narrow", "sym", "prefix", "empty", "batched")]
    # row tiles that see nothing are not visited but written; Sq > Sk leaves whole tiles of them
    found += [Check("empty", D) for D in (64, 128, 256)] + [
        Check("narrow", D, Hq=32, Sq=900, Sk=900) for D in (64, 256)
    ]
    found += [Check("causal", D, Sq=2000, Sk=300) for D in (64, 128, 256)] + [Check("empty", shards=2)]
    # more tiles than CTAs: what passes from one tile to the next
    found += [Check(m, D, Hq=16, Sq=1200, Sk=1200) for D, m in product((64, 128, 256), ("full", "causal", "documents"))]
    found += [Check(m, Hq=16, Sq=1280, Sk=1280, wide=w) for m, w in product(("full", "causal"), (False, True))]
    found += [Check(m, shards=2, wide=True) for m in ("causal", "window", "empty", "batched")]
    found += [
        Check(m, D, Hq=8, Hkv=h, Sq=s, Sk=2000)
        for m, D, h, s in (
            ("full", 128, 1, 1),
            ("causal", 128, 2, 5),
            ("causal", 64, 4, 3),
            ("window", 256, 1, 17),
            ("full", 64, 2, 40),
        )
    ]
    found += [
        Check("causal", Hq=6, Hkv=2, Sq=9, Sk=1000, wide=True),
        Check("causal", Hq=12, Hkv=2, Sq=10, Sk=900, shards=2),
    ]
    found += [
        Check(m, D, softcap=15.0, dtype=t)
        for m, D, t in (
            ("causal", 128, torch.bfloat16),
            ("full", 128, half),
            ("documents", 64, half),
            ("causal", 256, torch.bfloat16),
        )
    ]
    found += [
        Check("causal", softcap=15.0, shards=2),
        Check("full", dtype=half),
        Check("documents", dtype=half, **wide),
    ]
    if quick:
        return found
    found += [Check(m, D) for D, m in product((8, 40, 80, 96, 112, 136, 192), ("causal", "documents"))]
    found += [Check("window", D, shards=2, wide=w) for D, w in product((24, 72, 160, 248), (False, True))]
    found += [Check(m, D, layout=x) for m, D, x in product(("full", "documents"), (64, 128, 256), ("BHSD", "slice"))]
    found += [Check("causal", layout=x, shards=2, wide=True) for x in ("BHSD", "slice")]
    found += [Check("causal", D, size=8.0, Sq=s, Sk=s) for D, s in product((64, 128, 256), (768, 1000))]
    found += [Check("full", scale=s) for s in (0.0, -0.1, 0.3)] + [Check("documents", scale=0.0)]
    found += [Check("full", Sq=1, Sk=1, B=1), Check("causal", Sq=1, Sk=129), Check("full", Sq=129, Sk=1, wide=True)]
    found += [Check("full", Hq=5, Hkv=5, B=3, Sq=300, Sk=257), Check("documents", Hq=16, Hkv=1, B=1, Sq=1500, Sk=1500)]
    return found


SPECIAL: dict[str, Callable[[], str]] = {}


def special(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a check that is not a shape; it returns what is wrong, or nothing."""

    def register(fn: Callable[[], str]) -> Callable[[], str]:
        SPECIAL[name] = fn
        return fn

    return register


def run(checks: Sequence[Check]) -> bool:
    """Print one line a check; True if all are right."""
    wrong = 0
    print(f"{'':96} error/plain  max/plain  lse/plain")
    for check in checks:
        ratios, complaint = measure(check)
        wrong += bool(complaint)
        print(f"{check.name:96} {ratios}  {complaint and 'FAIL ' + complaint}".rstrip(), flush=True)
    for name, fn in SPECIAL.items():
        complaint = fn()
        wrong += bool(complaint)
        print(f"{name:96} {'FAIL ' + complaint if complaint else 'ok'}", flush=True)
    print(f"{len(checks) + len(SPECIAL) - wrong} right, {wrong} wrong", flush=True)
    return wrong == 0


def compiled(check: Check) -> str:
    """Compile a check's kernels into Triton's cache, in a process of its own; an error's message, or nothing."""
    try:
        q, k, v = inputs(check)
        ours(check, q, k, v, compile_only=True)
    except Exception as error:  # reported by name; the check itself then fails
        return f"  {check.name}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def inputs(check: Check) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh random q, k, v in the layout asked for."""
    shapes = ((check.Sq, check.Hq, check.size), (check.Sk, check.Hkv, 1.0), (check.Sk, check.Hkv, 1.0))
    return tuple(_laid_out(check, S, H) * size if size != 1 else _laid_out(check, S, H) for S, H, size in shapes)  # type: ignore[return-value]


def _laid_out(check: Check, S: int, H: int) -> Tensor:
    B, D, options = check.B, check.D, {"device": "cuda", "dtype": check.dtype}
    if check.layout == "BHSD":
        return torch.randn(B, H, S, D, **options).transpose(1, 2)  # type: ignore[call-overload,no-any-return]
    if check.layout == "slice":
        return torch.randn(B, 2 * S, H + 1, D + 8, **options)[:, ::2, 1:, :D]  # type: ignore[call-overload,no-any-return]
    return torch.randn(B, S, H, D, **options)  # type: ignore[call-overload,no-any-return]


def visible(check: Check) -> Visible:
    """The check's mask."""
    Sq, Sk = check.Sq, check.Sk
    if check.mask == "full":
        return Visible.full(Sq, Sk, "cuda")
    causal = Visible.causal(Sq, Sk, "cuda")
    if check.mask == "causal":
        return causal
    i = torch.arange(Sq, device="cuda", dtype=torch.int32)
    shift = Sk - Sq
    if check.mask == "window":
        return Visible((causal.hi - 150).clamp(min=0), causal.hi)
    if check.mask == "narrow":  # both bounds inside one block
        return Visible((causal.hi - 20).clamp(min=0), causal.hi)
    if check.mask == "sym":
        return Visible((i + shift - 70).clamp(0, Sk), (i + shift + 71).clamp(0, Sk))
    if check.mask == "prefix":
        return Visible(causal.lo, causal.hi.clamp(min=Sk // 3))
    if check.mask == "empty":  # rows in the middle and at the end see nothing
        hi = (i + 1 + shift).clamp(max=Sk // 2)
        return Visible(
            torch.minimum(torch.where(i > Sq // 4, i + shift, 0), hi).clamp(min=0).cummax(0).values.int(), hi
        )
    edges = torch.tensor([0, 1, 100, 101, 256, 300, 512, 513], device="cuda", dtype=torch.int32)
    lo = edges[torch.searchsorted(edges, i + shift, right=True) - 1].int() if Sq <= Sk else causal.lo
    if check.mask == "documents":
        return Visible(lo.clamp(max=Sk), causal.hi)
    assert check.mask == "batched"
    rows = [lo, (causal.hi - 90).clamp(min=0)]
    return Visible(torch.stack([rows[b % 2] for b in range(check.B)]), torch.stack([causal.hi] * check.B))


def ours(check: Check, q: Tensor, k: Tensor, v: Tensor, *, compile_only: bool = False) -> tuple[Partial, str]:
    """Our result, shard after shard, in guarded memory; and what was written where nothing may be."""
    whole = visible(check)
    state = _guarded(check, torch.float32)
    step = -(-check.Sk // check.shards)
    complaint, result = "", state[0]
    for n, begin in enumerate(range(0, check.Sk, step)):
        last = begin + step >= check.Sk
        end = min(begin + step, check.Sk)
        keys = slice(begin, end)
        into = state[0] if n else None
        wide = check.wide or not last
        guarded = state if wide else _guarded(check, check.dtype)
        result = guarded[0] if wide or not n else Partial(guarded[0].out, state[0].lse)
        if check.shards == 1:
            part = whole
        elif check.mask == "full":
            part = Visible.full(check.Sq, end - begin, "cuda")
        else:
            part = Visible((whole.lo - begin).clamp(0, end - begin), (whole.hi - begin).clamp(0, end - begin))
        one = launch.prepare(
            q,
            k[:, keys],
            v[:, keys],
            part,
            result,
            into,
            scale=_scale(check),
            softcap=check.softcap,
            counter=torch.zeros(2, dtype=torch.int32, device="cuda"),
            sms=schedule.multiprocessors(q.device),
        )
        if compile_only:
            one.warmup()
            continue
        one.run()
        complaint = complaint or guarded[1]() or state[1]()
    return result, complaint


def _scale(check: Check) -> float:
    return check.D**-0.5 if check.scale is None else check.scale


def _guarded(check: Check, dtype: torch.dtype) -> tuple[Partial, Callable[[], str]]:
    """NaN-filled outputs inside larger buffers, and a function that says whether the margins were touched."""
    shapes = ((check.B, check.Sq, check.Hq, check.D), dtype), ((check.B, check.Hq, check.Sq), torch.float32)
    buffers = [torch.full((math.prod(s) + 2 * MARGIN,), NAN, device="cuda", dtype=t) for s, t in shapes]
    inner = [x[MARGIN:-MARGIN].view(s) for x, (s, _) in zip(buffers, shapes, strict=True)]

    def touched() -> str:
        clean = all(bool(x[:MARGIN].isnan().all() and x[-MARGIN:].isnan().all()) for x in buffers)
        return "" if clean else "wrote outside its output"

    return Partial(inner[0], inner[1]), touched


def measure(check: Check) -> tuple[str, str]:
    """Ratios of our errors to plain PyTorch's, and what is wrong (nothing, if all is right)."""
    q, k, v = inputs(check)
    result, complaint = ours(check, q, k, v)
    mask, common = visible(check), {"scale": _scale(check), "softcap": check.softcap, "into": None}
    exact = reference.attend(q.double(), k.double(), v.double(), mask, out_dtype=torch.float64, **common)  # type: ignore[arg-type]
    plain = reference.attend(q, k, v, mask, out_dtype=check.dtype, **common)  # type: ignore[arg-type]
    if check.shards == 1:
        door = hopper.attend(q, k, v, mask, out_dtype=torch.float32 if check.wide else check.dtype, **common)  # type: ignore[arg-type]
        if not (torch.equal(door.out, result.out) and torch.equal(door.lse, result.lse)):
            complaint = complaint or "attend() differs from the launch in guarded memory"
    seen = exact.lse != -torch.inf
    if bool((result.lse == -torch.inf).ne(~seen).any()):
        complaint = complaint or "lse is -inf in other rows than it should be"
    if bool(result.out.transpose(1, 2)[~seen].ne(0).any()) or bool(result.out.isnan().any()):
        complaint = complaint or "empty rows are not 0, or NaN"
    error, allowed = ((x.out.double() - exact.out) for x in (result, plain))
    top = exact.out.abs().max().item() * FLOOR + 1e-12
    pairs = [
        (error.norm().item(), allowed.norm().item() + top * error.numel() ** 0.5),
        (error.abs().max().item(), allowed.abs().max().item() + top),
        tuple(((x.lse.double() - exact.lse)[seen].abs().max().item() if seen.any() else 0.0) for x in (result, plain)),
    ]
    pairs[2] = (
        pairs[2][0],
        pairs[2][1] + LSE_FLOOR * max(1.0, exact.lse[seen].abs().max().item() if seen.any() else 1.0),
    )
    ratios = [a / b for a, b in pairs]
    if not all(r <= 2.0 for r in ratios):
        complaint = complaint or "more than twice plain PyTorch's error"
    return "  ".join(f"{r:9.2f}" for r in ratios), complaint


def _small(S: int = 2048) -> tuple[list[Tensor], Visible]:
    qkv = [torch.randn(2, S, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return qkv, Visible.causal(S, S, "cuda")


def _attend(qkv: Sequence[Tensor], mask: Visible) -> Partial:
    return hopper.attend(*qkv, mask, scale=0.1, softcap=0.0, into=None, out_dtype=torch.bfloat16)  # type: ignore[misc]


@special("two streams at once")
def _streams() -> str:
    jobs = [_small() for _ in range(2)]
    alone = [_attend(*job) for job in jobs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in jobs]
    found: list[list[Partial]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(_attend(*jobs[i]))
    torch.cuda.synchronize()
    same = all(torch.equal(x.out, alone[i].out) and torch.equal(x.lse, alone[i].lse) for i in (0, 1) for x in found[i])
    return "" if same else "results differ from those of one stream"


@special("CUDA graph: captured, replayed on new inputs, beside the stream")
def _graph() -> str:
    qkv, mask = _small()
    _attend(qkv, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [_attend(qkv, mask) for _ in range(2)]
    fresh, _ = _small()
    for _ in range(3):
        for x, y in zip(qkv, fresh, strict=True):
            x.copy_(y)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.replay()
        expected = _attend(qkv, mask)
        torch.cuda.synchronize()
        if not all(torch.equal(x.out, expected.out) and torch.equal(x.lse, expected.lse) for x in captured):
            return "the replay differs from a plain call"
        fresh, _ = _small()
    return ""


@special("CUDA graph: a mask first met inside the capture")
def _graph_new_mask() -> str:
    qkv, causal = _small()
    _attend(qkv, Visible(causal.lo, causal.hi))  # compiled, but no table of the mask below
    mask = Visible(causal.lo, causal.hi.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _attend(qkv, mask)
    eager = _attend(qkv, mask)  # before any replay: must not read the graph's table
    expected = _attend(qkv, causal)
    graph.replay()
    torch.cuda.synchronize()
    for name, found in (("an eager call before the first replay", eager), ("the replay", captured)):
        if not (found.out - expected.out).abs().max() < 0.02:
            return f"{name} is wrong"
    return ""


@special("more than 2^31 elements (1.1M tokens, 16 heads, window)")
def _long() -> str:
    S, tail, window = 1_100_000, 512, 300
    qkv = [torch.randn(1, S, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    causal = Visible.causal(S, S, "cuda")
    mask = Visible((causal.hi - window).clamp(min=0), causal.hi)
    for wide in (False, True):
        dtype = torch.float32 if wide else torch.bfloat16
        found = hopper.attend(*qkv, mask, scale=0.1, softcap=0.0, into=None, out_dtype=dtype)  # type: ignore[misc]
        keys = tail + window
        short = [qkv[0][:, -tail:].double(), *(x[:, -keys:].double() for x in qkv[1:])]
        local = Visible((mask.lo[-tail:] - (S - keys)).contiguous(), (mask.hi[-tail:] - (S - keys)).contiguous())
        exact = reference.attend(*short, local, scale=0.1, softcap=0.0, into=None, out_dtype=torch.float64)  # type: ignore[misc]
        error = (found.out[:, -tail:].double() - exact.out).norm() / exact.out.norm()
        if not error < 6e-3 or not (found.lse[:, :, -tail:].double() - exact.lse).abs().max() < 1e-3:
            return f"error {error:.1e} in the last rows"
    return ""
