"""Runner: a causal LM whose keys and values lie on all ranks of a group; prefill in chunks, decode in batches.

    runner = Runner(model, memory=40 << 30)
    runner.create(0)
    logits = runner.prefill(0, ids)                     # [vocab], after the last token
    logits = runner.decode([0], [[int(logits.argmax())]])  # [1, 1, vocab]

Every rank calls the same methods with the same arguments in the same order, as it does with `ring_attention`. Each
holds the whole model; of a chunk it computes its share of the rows, and of decode steps everything but attention.

On a mesh cp x tp the ranks along tp share the weights of the model, and with them its heads: each holds a slice (see
`ringfa3.inference.tensor`), and of the cache the keys and values of its heads, by position shared with those along cp.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ringfa3.agree import ENDED, ENDING, Agreement, Signature
from ringfa3.errors import RankFailed
from ringfa3.gang import Gang
from ringfa3.hops import LONGEST
from ringfa3.inference.attend import Decode, Prefill
from ringfa3.inference.cache import PagedCache
from ringfa3.inference.chunk import WAYS
from ringfa3.inference.graphs import Graphs
from ringfa3.inference.model import Paged, reach
from ringfa3.inference.newest import Form, Newest
from ringfa3.inference.pages import Pages, Placed
from ringfa3.inference.ranks import Axes
from ringfa3.inference.tensor import sharing, split
from ringfa3.shards import Group
from ringfa3_kernels import Visible, attend, decode

MOST_TOKENS = 8  # of a sequence in a decode step


class Runner:
    """A model, its cache, and the ranks that share it.

    Args:
        model: a causal LM that `ringfa3.inference.model.served` allows, alike on all ranks, on this rank's device. On a
            mesh with tp, of `load` with that mesh; or whole: then it is cut in place.
        group: the ranks; None: all of them (one, without torch.distributed). A 2-D DeviceMesh with the axes cp and tp:
            the cache is shared along cp, the weights along tp.
        memory: bytes of this rank's cache, which is allocated at once; alike on all ranks.
        pages: instead of memory, how many pages of the cache each rank has.
        page_size: tokens in a page.
        prefill: "pass-kv", "pass-q", or "auto": what moves in a prefill is decided by cost, chunk by chunk.
        graphs: decode steps are captured as CUDA graphs, on a GPU. Alike on all ranks.
        impl: of the kernels, for prefill and decode alike.

    Attributes:
        model: as given.
        pages: the accounting, alike on all ranks; its world are the ranks along cp.
        cache: this rank's keys and values.
        vocab: number of token ids.
        max_length: tokens that a sequence can have: what the model was made for, and where some layer sees all of them
            at most what all pages hold.

    Raises:
        ValueError: an argument is wrong, or ranks differ; names it, what was wanted and what came.
        Unsupported: the model is none that can be served, or its weights cannot be shared by so many; says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        group: Group = None,
        memory: int | None = None,
        pages: int | None = None,
        page_size: int = 64,
        prefill: str = "auto",
        graphs: bool = False,
        impl: str = "auto",
    ) -> None:
        if prefill not in WAYS:
            raise ValueError(f"prefill: wanted one of {', '.join(map(repr, WAYS))}, got {prefill!r}")
        if (memory is None) == (pages is None):
            raise ValueError(f"memory: wanted either it or pages, got memory={memory!r} and pages={pages!r}")
        axes = Axes.of(group)
        shared = sharing(model) if isinstance(model, PreTrainedModel) else None
        if shared is not None and shared.numbers != axes.tensor.numbers:
            raise ValueError(f"group: wanted the mesh that the model was cut for, got tp {axes.tensor.world}")
        if isinstance(model, PreTrainedModel) and shared is None:
            split(model, axes.tensor)
        self.model, self._model = model, Paged(model)
        self._ranks, self._everyone, self._tensor = axes.cache, axes.all, shared or axes.tensor
        self._way, self._impl = prefill, impl
        sizes = {"layers": self._model.layers, "kv_heads": self._model.kv_heads, "head_dim": self._model.head_dim}
        dtype = self._model.dtype
        device = self._device = self._model.device  # kept: asking the model takes it 10 us
        if pages is None:
            assert memory is not None
            pages = PagedCache.pages_within(memory, **sizes, page_size=page_size, dtype=dtype)
        self.pages = Pages(self._ranks.world, pages, page_size, reach=reach(self._model.masks))
        if (pages + 1) * page_size > LONGEST:
            raise ValueError(f"pages: wanted fewer than {LONGEST} tokens on a rank, got {pages} pages of {page_size}")
        self._rehearse()
        self._agreement: Agreement | None = None
        if self._everyone.world > 1:
            self._agreement = self._watched()
        same = {**sizes, "pages": pages, "page_size": page_size, "dtype": dtype, "prefill": prefill, "graphs": graphs}
        self._agree((("call", "Runner"), *same.items()))
        self.cache = PagedCache(**sizes, pages=pages, page_size=page_size, dtype=dtype, device=device)
        self._graphs = Graphs(self._model, self.cache, self._ranks, impl=impl) if graphs else None
        self.vocab = self._model.vocab
        room = self._ranks.world * pages * page_size
        self.max_length = self._model.longest if self.pages.reach is not None else min(self._model.longest, room)

    def create(self, seq: int) -> None:
        """Begin an empty sequence. Raises ValueError where there is one of that number."""
        self.pages.create(seq)

    def fork(self, parent: int, child: int) -> None:
        """Begin a sequence with the parent's tokens, which it shares. Raises ValueError as `create`."""
        self.pages.fork(parent, child)

    def free(self, seq: int) -> None:
        """Forget a sequence. Raises ValueError for an unknown one."""
        self.pages.free(seq)

    def truncate(self, seq: int, n: int) -> None:
        """Keep a sequence's first n tokens.

        Raises:
            ValueError: it is unknown or shorter, or, in a model whose layers all have windows, what token n sees is
                not cached any more (see `Pages.cuts`); 0 is always right.
        """
        self.pages.truncate(seq, n)

    def prefill(self, seq: int, ids: Sequence[int]) -> Tensor:
        """Append a chunk to a sequence; collective.

        Args:
            seq: which.
            ids: the chunk's tokens, at least one.

        Returns:
            fp32 [vocab], the logits after its last token, on every rank.

        Raises:
            ValueError: an argument is wrong, or ranks differ. As below, nothing has changed then.
            CacheFull: it does not fit, on all ranks.
            RankFailed: another rank failed.
        """
        tokens = self._checked("prefill", [seq], [ids])[0]
        rank = self._ranks.rank
        with self._appended({seq: tokens.size}) as appended:
            placed = appended[seq]
            step = Prefill(self.cache, self.pages, seq, placed, self._ranks, way=self._way, impl=self._impl)
            # no model takes no rows: a rank that has none computes the first one, too, which the step ignores
            rows = placed.positions[rank] if step.rows else np.array([placed.start])
            end = placed.start + placed.count - 1
            (owner,) = (r for r, positions in enumerate(placed.positions) if end in positions[-1:])
            keep = torch.tensor([rows.size - 1] if owner == rank else [], dtype=torch.long)
            ids_, positions = (torch.from_numpy(x)[None] for x in (tokens[rows - placed.start], rows))
            return self._shared(self._model(step, ids_, positions, keep)[0], owner)

    def decode(self, seqs: Sequence[int], ids: Sequence[Sequence[int]]) -> Tensor:
        """Append a few tokens to each of several sequences; collective.

        Args:
            seqs: which; each once.
            ids: 1 to 8 tokens for each, equally many.

        Returns:
            fp32 [B, n, vocab], the logits after each of them, bitwise equal on every rank.

        Raises:
            ValueError, CacheFull, RankFailed: as `prefill`.
        """
        tokens = self._checked("decode", seqs, ids)
        with self._appended({seq: tokens.shape[1] for seq in seqs}) as placed:
            newest = Newest.of(self.pages, placed, self._model.masks, self._ranks.rank, self.cache.scratch)
            if self._graphs is not None:
                return self._graphs(tokens, newest).clone()
            form = Form.of(newest)
            sent = form.unpack(form.pack(tokens, newest, self.cache.scratch).to(self._device))
            return self._model(Decode(self.cache, self._ranks, sent, impl=self._impl), sent.ids, sent.positions)

    def warm(self, most: int) -> None:
        """Capture the graphs of decode steps of up to so many sequences now, while nobody waits for them; collective.

        One for each power of 2, with tables of few pages (see `Form.of`); others are captured on first use. Every
        sequence takes a page for a moment.

        Args:
            most: sequences of the largest step; more than there are pages for come to that many.

        Raises:
            ValueError: there are no graphs, or sequences already; or most is no positive integer, or ranks differ.
            RankFailed: another rank failed.
        """
        wrong = None
        if self._graphs is None:
            wrong = "graphs: wanted True where decode steps are to be captured, got False"
        elif self.pages.sequences:
            wrong = f"sequences: wanted none yet, got {len(self.pages.sequences)}"
        elif isinstance(most, bool) or not isinstance(most, int) or most < 1:
            wrong = f"most: wanted an integer, 1 or more, got {most!r}"
        self._agree((("call", "warm"), ("most", most)), None if wrong is None else ValueError(wrong))
        most = min(most, self.pages.world * self.pages.pages)
        for batch in [1 << i for i in range((most - 1).bit_length())] + [most]:
            for seq in range(batch):
                self.create(seq)
            self.decode(range(batch), [[0]] * batch)
            for seq in range(batch):
                self.free(seq)

    def check(self) -> None:
        """Raise RankFailed where a rank is known to have failed.

        On a GPU a call returns before the device is through with it; where that was ended because a rank failed, its
        logits are garbage. So whoever has read logits asks this before he believes them.
        """
        if self._agreement is not None:
            self._agreement.check()

    def _watched(self) -> Agreement:
        """The agreement of all ranks, whose watch looks at everything that they do together."""
        gang = Gang.of(self._everyone.group)
        agreement = gang.agreement()
        watch = gang.watch(agreement)
        watch.follow(gang, range(self._everyone.world))
        for ranks in dict.fromkeys((self._ranks, self._tensor)):
            if ranks.world > 1:
                watch.follow(ranks, ranks.numbers)
        if self._ranks is not self._everyone and self._ranks.world > 1:
            watch.follow(Gang.of(self._ranks.group), self._ranks.numbers)
        return agreement

    def _checked(self, call: str, seqs: Sequence[int], ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """The tokens [B, n] of the sequences, if all ranks were given the same and it is right.

        Raises:
            ValueError: it is not; on every rank.
        """
        error: ValueError | None = None
        tokens = np.zeros((0, 0), np.int64)
        try:
            tokens = self._tokens(seqs, ids, MOST_TOKENS if call == "decode" else self.max_length)
        except ValueError as wrong:
            error = wrong
        said = blake2b(tokens.tobytes(), digest_size=8).hexdigest()
        self._agree((("call", call), ("seqs", tuple(seqs)), ("tokens", tokens.shape), ("ids (digest)", said)), error)
        return tokens

    def _tokens(self, seqs: Sequence[int], ids: Sequence[Sequence[int]], most: int) -> NDArray[np.int64]:
        """Of each sequence its own, equally many. Raises ValueError where something is wrong: names it."""
        if not seqs or len(set(seqs)) != len(seqs) or len(ids) != len(seqs):
            raise ValueError(f"seqs: wanted sequences, each once, and ids for each, got {list(seqs)} and {len(ids)}")
        if set(map(type, ids)) == {list} and len(set(map(len, ids))) == 1:  # all at once, as every decode step has them
            flat = list(chain.from_iterable(ids))
            count, held = len(ids[0]), max(map(self.pages.length, seqs))
            right = set(map(type, flat)) == {int} and min(flat) >= 0 and max(flat) < self.vocab
            if right and count <= min(most, self.max_length - held):
                return np.array(flat, np.int64).reshape(len(ids), count)
        tokens = []
        for seq, given in zip(seqs, ids, strict=True):
            array = np.asarray(given)
            room = min(most, self.max_length - self.pages.length(seq))
            if array.ndim != 1 or array.dtype.kind not in "iu" or not 1 <= array.size <= room:
                raise ValueError(f"ids: wanted 1 to {room} tokens for sequence {seq}, got {_short(given)}")
            if array.min() < 0 or array.max() >= self.vocab:
                raise ValueError(f"ids: wanted tokens in [0, {self.vocab}), got {array.min()} to {array.max()}")
            tokens.append(array.astype(np.int64))
        if len({each.size for each in tokens}) != 1:
            raise ValueError(f"ids: wanted equally many for each sequence, got {[each.size for each in tokens]}")
        return np.stack(tokens)

    def _rehearse(self) -> None:
        """Raise now what the kernels' doors would raise in a pass, where others would be left waiting."""
        model, page_size = self._model, self.pages.page_size
        for heads, softcap in model.queries:
            q, k, pages = (
                torch.empty(1, rows, n, model.head_dim, dtype=model.dtype, device=model.device)
                for rows, n in ((0, heads), (0, model.kv_heads), (page_size, model.kv_heads))
            )
            attend(q, k, k, softcap=softcap, impl=self._impl)
            table = torch.zeros(1, 1, dtype=torch.int32, device=model.device)
            decode(q, pages, pages, table, Visible.full(0, 0, model.device), softcap=softcap, impl=self._impl)

    @contextmanager
    def _appended(self, counts: dict[int, int]) -> Iterator[dict[int, Placed]]:
        """Places for so many tokens of each sequence; taken back where the step fails, which is told the other ranks.

        A sequence whose shared page could not even be copied is freed.

        Raises:
            CacheFull: there is no room; on every rank, before anything has changed.
        """
        placed = self.pages.append_all(counts)
        copied = False
        try:
            with self._ranks.step(self._device), self._tensor.step(self._device):
                self.cache.copy(pair for each in placed.values() for pair in each.copies[self._ranks.rank])
                copied = True
                yield placed
            for seq in placed:
                self.pages.trim(seq)
        except BaseException as error:
            for seq, each in placed.items():
                if copied or not any(each.copies):
                    self.pages.truncate(seq, each.start)
                else:  # its last page is a copy that was not made
                    self.pages.free(seq)
            if self._agreement is None:
                raise
            blamed = self._blamed(self._agreement, error)
            failure = self._agreement.abandon(blamed) or blamed
            if failure is error or not isinstance(error, Exception):
                raise
            raise failure from error

    def _blamed(self, agreement: Agreement, error: BaseException) -> BaseException:
        """The error; or RankFailed, where a collective broke off because another rank has failed.

        A rank that failed ends its connections, which may be seen before its alarm is.
        """
        deadline = time.monotonic() + ENDING
        while isinstance(error, RuntimeError) and not isinstance(error, RankFailed) and time.monotonic() < deadline:
            for rank in agreement.others:
                if agreement.peers[rank].dead():
                    return RankFailed(rank, agreement.peers[rank].host, None, ENDED)
            failure = agreement.failure or agreement.heard()
            if failure is not None:
                return failure
            time.sleep(1e-3)
        return error

    def _agree(self, said: Signature, error: ValueError | None = None) -> None:
        """Raise the error, or (on every rank) what the ranks differ in."""
        if self._agreement is not None:
            self._agreement.agree(said, 0, error)
        elif error is not None:
            raise error

    def _shared(self, logits: Tensor, owner: int) -> Tensor:
        """The owner's logits [1, vocab] on every rank: [vocab]."""
        if self._ranks.rank != owner:
            logits = logits.new_empty(1, self.vocab)
        if self._ranks.world > 1:
            self._ranks.broadcast(logits, owner)
        return logits[0]


def _short(x: object) -> str:
    text = repr(x)
    return text if len(text) < 80 else f"{text[:80]}..."
