"""The contract that every implementation of attend and attend_backward keeps: its cases, and what is asked of each."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ringfa3_kernels import Partial, Unsupported, Visible, attend, attend_backward, row_delta
from tests.kernels.oracle import Answer, Unlucky, assert_close, plain
from tests.kernels.places import Places

Sight = Callable[["Case", torch.Generator], Visible]


@dataclass(frozen=True)
class Case:
    """A call: sizes, what rows see, and how the tensors lie in memory.

    Args:
        layout: a key of LAYOUTS, for q, k, v and dout.
        alibi: scores are biased by distance.
        dropout: share of the probabilities that are dropped.
        cuts: where the keys are cut into shards, for the tests that continue a Partial; () cuts them nowhere.
    """

    name: str
    Sq: int
    Sk: int
    sight: Sight
    B: int = 1
    Hq: int = 2
    Hkv: int = 2
    D: int = 16
    scale: float | None = None
    softcap: float = 0.0
    layout: str = "dense"
    cuts: tuple[int, ...] = ()
    alibi: bool = False
    dropout: float = 0.0


def full(case: Case, _: torch.Generator) -> Visible:
    return Visible.full(case.Sq, case.Sk)


def causal(case: Case, _: torch.Generator) -> Visible:
    return Visible.causal(case.Sq, case.Sk)


def window(left: int, right: int) -> Sight:
    """Keys from `left` before to `right` after the row's own, which is aligned at the end as causal's."""

    def sight(case: Case, _: torch.Generator) -> Visible:
        own = torch.arange(case.Sq) + case.Sk - case.Sq
        return bounds(own - left, own + right + 1, case.Sk)

    return sight


def documents(*lengths: int, causal: bool = True) -> Sight:
    """Rows see their own document, up to themselves where it is causal."""

    def sight(case: Case, _: torch.Generator) -> Visible:
        ends = torch.tensor(lengths).cumsum(0)
        own = torch.searchsorted(ends, torch.arange(case.Sq), right=True)
        starts = ends - torch.tensor(lengths)
        return bounds(starts[own], torch.arange(1, case.Sq + 1) if causal else ends[own], case.Sk)

    return sight


def prefix(length: int) -> Sight:
    """The first `length` positions see each other both ways, the others are causal."""
    return lambda case, _: bounds(torch.zeros(case.Sq), torch.arange(1, case.Sq + 1).clamp(min=length), case.Sk)


def strided(case: Case, _: torch.Generator) -> Visible:
    """What a rank of a striped layout sees of a longer shard's keys: the bound moves by several keys a row."""
    return bounds(torch.zeros(case.Sq), torch.arange(case.Sq) * case.Sk // case.Sq, case.Sk)


def ragged(case: Case, generator: torch.Generator) -> Visible:
    """Any sorted bounds, of each batch row its own; about a third of the rows are empty, in the middle too."""
    lo, hi = (torch.randint(0, case.Sk + 1, (case.B, case.Sq), generator=generator).sort(-1)[0] for _ in "lh")
    shift = torch.randint(-case.Sk // 2, case.Sk // 2, (case.B, 1), generator=generator)
    return bounds(lo - shift, hi + shift, case.Sk)


def blind(case: Case, _: torch.Generator) -> Visible:
    """Nobody sees anything, though there are keys."""
    return bounds(torch.full((case.Sq,), 3), torch.full((case.Sq,), 3), case.Sk)


def bounds(lo: Tensor, hi: Tensor, Sk: int) -> Visible:
    return Visible(lo.clamp(0, Sk).int(), hi.clamp(0, Sk).int())


CASES = (
    Case("full", 70, 90, full, D=64, cuts=(45,)),
    Case("one key and one row", 1, 1, full, D=40),
    Case("one row", 1, 77, full, Hq=4, Hkv=1, D=64, cuts=(0, 20, 70)),
    Case("one key", 50, 1, causal, cuts=(1,)),
    Case("no keys", 19, 0, full, cuts=(0,)),
    Case("causal", 80, 80, causal, D=64, cuts=(20, 40, 60)),
    Case("causal, prime length", 67, 67, causal, Hq=3, Hkv=3, D=24, cuts=(31,)),
    Case("causal, more keys", 35, 79, causal, D=40, cuts=(50,)),
    Case("causal, fewer keys", 79, 35, causal, D=40, cuts=(17,)),
    Case("causal, GQA 4", 30, 40, causal, Hq=8, Hkv=2, D=32, cuts=(20,)),
    Case("causal, GQA 8", 21, 30, causal, Hq=16, Hkv=2, cuts=(10,)),
    Case("causal, MQA", 45, 45, causal, Hq=5, Hkv=1, D=16, cuts=(9,)),
    Case("window", 75, 75, window(16, 0), D=32, cuts=(30,)),
    Case("window both ways", 60, 75, window(11, 7), D=16, cuts=(25, 50)),
    Case("window to the right", 75, 60, window(0, 20), D=16, cuts=(30,)),
    Case("documents", 80, 80, documents(5, 1, 30, 33, 11), D=32, cuts=(10, 40)),
    Case("documents, both ways", 64, 64, documents(32, 16, 16, causal=False), D=32, cuts=(32,)),
    Case("prefix-LM", 70, 70, prefix(33), D=16, cuts=(35,)),
    Case("strided", 40, 80, strided, D=16, cuts=(40,)),
    Case("ragged", 50, 60, ragged, B=2, D=16, cuts=(20, 40)),
    Case("ragged, GQA 4, softcap", 50, 60, ragged, B=2, Hq=4, Hkv=1, D=24, softcap=2.0, scale=0.7, cuts=(30,)),
    Case("nobody sees anything", 30, 30, blind, B=2, cuts=(15,)),
    Case("scale", 50, 50, causal, scale=0.4, D=32, cuts=(25,)),
    Case("scale below 0", 50, 50, causal, scale=-0.3, D=32, cuts=(25,)),
    Case("scale 0", 20, 30, full, scale=0.0, cuts=(15,)),
    Case("scores far from 0", 40, 60, full, scale=8.0, D=16, cuts=(30,)),
    Case("softcap", 70, 70, causal, softcap=5.0, scale=1.0, D=32, cuts=(35,)),
    Case("head_dim 8", 30, 30, causal, D=8),
    Case("head_dim 80", 33, 50, causal, D=80),
    Case("head_dim 128", 50, 70, causal, D=128, cuts=(35,)),
    Case("head_dim 192", 33, 33, causal, D=192),
    Case("head_dim 256", 33, 33, causal, D=256),
    Case("heads before rows", 50, 60, causal, B=2, Hkv=1, layout="heads before rows", D=32, cuts=(30,)),
    Case("a slice of heads", 50, 60, causal, B=2, Hkv=1, layout="slice", D=40, cuts=(30,)),
    Case("head_dim not contiguous", 30, 40, causal, layout="spread", cuts=(20,)),
    Case("head_dim before rows", 30, 40, causal, layout="head_dim before rows", cuts=(20,)),
    Case("one batch row for all", 30, 40, causal, B=2, layout="expanded", cuts=(20,)),
    Case("ALiBi", 70, 90, causal, Hq=3, Hkv=3, D=64, cuts=(45,), alibi=True),
    Case("ALiBi, both ways, GQA 2, softcap", 40, 60, full, B=2, Hq=4, softcap=4.0, D=24, cuts=(20,), alibi=True),
    Case("dropout", 80, 80, causal, D=64, cuts=(20, 60), dropout=0.2),
    Case("dropout, GQA 2, softcap", 40, 60, full, B=2, Hq=4, D=16, softcap=4.0, cuts=(30,), dropout=0.6),
    Case("ALiBi, dropout, ragged", 50, 60, ragged, B=2, Hq=4, D=16, cuts=(20, 40), alibi=True, dropout=0.3),
    Case("ALiBi, dropout, scale below 0", 50, 50, causal, scale=-0.3, D=128, cuts=(25,), alibi=True, dropout=0.1),
)


CLAUSES = ("forward", "backward", "shards")


def _slice(x: Tensor) -> Tensor:
    B, S, H, D = x.shape
    around = x.new_full((B, S + 1, H + 2, D + 3), torch.nan)
    around[:, :S, 1:-1, 1:-2] = x
    return around[:, :S, 1:-1, 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": _slice,
    "spread": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "head_dim before rows": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "expanded": lambda x: x[:1].expand_as(x),
}


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, drawn anew in every run."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    visible: Visible
    places: Places

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        """Normal numbers, made on the CPU so that a seed means the same everywhere."""

        def draw(S: int, H: int) -> Tensor:
            return LAYOUTS[case.layout](torch.randn(case.B, S, H, case.D, generator=generator).to(device, dtype))

        q, k, v = draw(case.Sq, case.Hq), draw(case.Sk, case.Hkv), draw(case.Sk, case.Hkv)
        state = torch.promote_types(dtype, torch.float32)
        dlse = torch.randn(case.B, case.Sq, case.Hq, generator=generator).to(device, state).transpose(1, 2)
        dout, visible = draw(case.Sq, case.Hq), case.sight(case, generator).to(device)
        places = Places.draw(
            case.B, case.Sq, case.Sk, case.Hq, alibi=case.alibi, dropout=case.dropout, generator=generator
        ).to(device)
        return cls(case, q, k, v, dout, dlse, visible, places)

    @property
    def state(self) -> torch.dtype:
        """What out, lse and gradients are kept in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def plain(self, dtype: torch.dtype | None = None) -> Answer:
        """Plain PyTorch's answer in `dtype`, or in that of the inputs."""
        mask = self.visible.mask(self.case.Sk).expand(self.case.B, -1, -1)
        return plain(
            self.q,
            self.k,
            self.v,
            self.dout,
            self.dlse,
            mask,
            dtype=dtype or self.q.dtype,
            scale=self.case.scale,
            softcap=self.case.softcap,
            bias=self.places.bias(),
            weights=self.places.weights(),
        )

    def shards(self) -> Iterator[tuple[slice, Visible]]:
        """The keys in pieces, and what rows see of each, in its own indices."""
        edges = (0, *self.case.cuts, self.case.Sk)
        for start, stop in itertools.pairwise(edges):
            lo, hi = ((x - start).clamp(0, stop - start) for x in (self.visible.lo, self.visible.hi))
            yield slice(start, stop), Visible(lo, hi)


UNALIGNED = ("slice", "spread", "head_dim before rows")  # layouts that TMA cannot read
# What implementations may answer with Unsupported, and must: (implementation, device, dtype); for hopper see `refused`
UNSUPPORTED = frozenset(
    [
        ("portable", "cpu", torch.bfloat16),  # tl.dot is wrong for it in Triton's interpreter
        ("portable", "cpu", torch.float64),
        ("portable", "cuda", torch.float64),
        *(("aten", "cuda", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    ]
)


def check(clause: str, impl: str, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """That an implementation keeps a clause in a case or, where it may, refuses it by name.

    Raises:
        AssertionError: the clause is broken; errors just above the rule count once three draws in a row show them.
    """
    for draws_left in (2, 1, 0):
        try:
            return _check_one_draw(clause, impl, case, dtype, device, generator)
        except Unlucky:
            if not draws_left:
                raise


def _check_one_draw(
    clause: str, impl: str, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    inputs = Inputs.draw(case, dtype, device, generator)
    if refused(impl, case, dtype, device):
        with pytest.raises(Unsupported, match=impl):
            attend(inputs.q, inputs.k, inputs.v, inputs.visible, impl=impl, **inputs.places.options())
        return
    getattr(Contract.of(impl, inputs), clause)()


def refused(impl: str, case: Case, dtype: torch.dtype, device: str) -> bool:
    """Whether the implementation may, and must, answer with Unsupported."""
    if impl == "hopper":
        unserved = case.layout in UNALIGNED or case.alibi or case.dropout > 0
        return device == "cpu" or dtype not in (torch.bfloat16, torch.float16) or unserved
    return (impl, device, dtype) in UNSUPPORTED


@dataclass(frozen=True)
class Contract:
    """One implementation and the calls it is asked: each method checks a clause, on inputs with their truth."""

    impl: str
    inputs: Inputs
    truth: Answer
    yardstick: Answer

    @classmethod
    def of(cls, impl: str, inputs: Inputs) -> Contract:
        return cls(impl, inputs, inputs.plain(torch.float64), inputs.plain())

    def forward(self) -> None:
        """out and lse are right; a 16-bit out is the fp32 one, rounded."""
        x = self.inputs
        found = self._attend(x.k, x.v, x.visible)
        assert found.out.dtype == x.state
        assert found.lse.dtype == x.state
        self._close("out", found.out)
        self._close("lse", found.lse)
        unseen = (x.visible.hi <= x.visible.lo).expand(x.case.B, -1)
        assert not found.out[unseen].any(), "out: rows that saw nothing are not 0"
        narrow = self._attend(x.k, x.v, x.visible, out_dtype=x.q.dtype)
        assert narrow.out.dtype == x.q.dtype
        assert torch.equal(narrow.out, found.out.to(x.q.dtype))
        assert torch.equal(narrow.lse, found.lse)

    def backward(self) -> None:
        """Gradients through out and lse: stored over whatever was there, stored in q's dtype, or added."""
        x = self.inputs
        found = self._attend(x.k, x.v, x.visible)
        delta = row_delta(x.dout, found.out, x.dlse)
        stored = self._gradients(torch.nan, x.state)
        self._attend_backward(found.lse, delta, x.k, x.v, x.visible, stored, accumulate=False)
        for name, grad in zip(("dq", "dk", "dv"), stored, strict=True):
            self._close(name, grad)
        narrow = self._gradients(torch.nan, x.q.dtype)
        self._attend_backward(found.lse, delta, x.k, x.v, x.visible, narrow, accumulate=False)
        added = self._gradients(3.0, x.state)
        self._attend_backward(found.lse, delta, x.k, x.v, x.visible, added, accumulate=True, deterministic=True)
        for name, grad, in_q, more in zip(("dq", "dk", "dv"), stored, narrow, added, strict=True):
            torch.testing.assert_close(in_q, grad.to(x.q.dtype), msg=lambda m, n=name: f"{n} in q's dtype: {m}")
            self._close(f"{name} added to 3", more - 3.0)

    def shards(self) -> None:
        """A Partial is continued in place over shards of keys, and the shards' gradients sum up."""
        x = self.inputs
        around = self._state()
        partial = held = Partial(around.out[:, : x.case.Sq], around.lse[..., : x.case.Sq])
        pieces = list(x.shards())
        for number, (keys, visible) in enumerate(pieces):
            last = number == len(pieces) - 1
            if last:
                before = partial.out.clone()
                final = Partial(before.clone(), partial.lse.clone())
                narrow = self._attend(x.k[:, keys], x.v[:, keys], visible, keys, into=final, out_dtype=x.q.dtype)
            partial = self._attend(x.k[:, keys], x.v[:, keys], visible, keys, into=partial)
            assert partial.out is held.out, "into.out is not what came back"
            assert partial.lse is held.lse, "into.lse is not what came back"
        self._close("out", partial.out)
        self._close("lse", partial.lse)
        assert (around.out[:, x.case.Sq :] == 7).all(), "wrote around into.out"
        assert (around.lse[..., x.case.Sq :] == 7).all(), "wrote around into.lse"
        assert torch.equal(narrow.out, partial.out.to(x.q.dtype))
        assert narrow.lse is final.lse
        assert torch.equal(narrow.lse, partial.lse)
        if x.q.dtype != x.state:
            assert torch.equal(final.out, before), "into.out was written though out_dtype is another"
        self._backward_over(pieces, partial)

    def _backward_over(self, pieces: list[tuple[slice, Visible]], final: Partial) -> None:
        x = self.inputs
        delta = row_delta(x.dout, final.out, x.dlse)
        dq, dk, dv = self._gradients(0.0, x.state)
        for keys, visible in pieces:
            shard = [g[:, keys].clone() for g in (dk, dv)]
            self._attend_backward(
                final.lse, delta, x.k[:, keys], x.v[:, keys], visible, [dq, *shard], keys, accumulate=True
            )
            dk[:, keys], dv[:, keys] = shard
        for name, grad in (("dq", dq), ("dk", dk), ("dv", dv)):
            self._close(name, grad)

    def _close(self, name: str, got: Tensor) -> None:
        which = name.split()[0]
        assert_close(name, got, getattr(self.truth, which), getattr(self.yardstick, which), self.inputs.q.dtype)

    def _state(self) -> Partial:
        """Nothing seen yet; where the inputs are views, followed by rows of 7 that are not the call's to touch."""
        partial = Partial.empty(self.inputs.q)
        if self.inputs.case.layout == "dense":
            return partial
        out, lse = (torch.full_like(t, 7.0) for t in (partial.out, partial.lse))
        return Partial(torch.cat([partial.out, out], 1), torch.cat([partial.lse, lse], 2))

    def _gradients(self, value: float, dtype: torch.dtype) -> list[Tensor]:
        x = self.inputs
        return [torch.full(t.shape, value, dtype=dtype, device=t.device) for t in (x.q, x.k, x.v)]

    def _attend(self, k: Tensor, v: Tensor, visible: Visible, keys: slice = slice(None), **options: object) -> Partial:
        case, places = self.inputs.case, self.inputs.places.options(keys)
        with stale_memory(self.impl):
            return attend(
                self.inputs.q,
                k,
                v,
                visible,
                scale=case.scale,
                softcap=case.softcap,
                impl=self.impl,
                **options,
                **places,
            )

    def _attend_backward(
        self,
        lse: Tensor,
        delta: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visible,
        grads: list[Tensor],
        keys: slice = slice(None),
        *,
        accumulate: bool,
        deterministic: bool = False,
    ) -> None:
        x = self.inputs
        dq, dk, dv = grads
        with stale_memory(self.impl):
            attend_backward(
                x.dout,
                x.q,
                k,
                v,
                lse,
                delta,
                visible,
                dq=dq,
                dk=dk,
                dv=dv,
                accumulate=accumulate,
                scale=x.case.scale,
                softcap=x.case.softcap,
                deterministic=deterministic,
                impl=self.impl,
                **x.places.options(keys),
            )


@contextlib.contextmanager
def stale_memory(impl: str) -> Iterator[None]:
    """While it lasts torch.empty hands out NaN, so that what is read or returned unwritten shows."""
    if impl == "reference":  # allocates nothing with torch.empty, and cuBLAS refuses the mode below
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
