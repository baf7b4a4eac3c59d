"""Whole: what a model within context_parallel is given for whole sequences, checked, before any of it is sharded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ringfa3.integrations.words import padding_documents
from ringfa3.mask import Mask
from ringfa3.plan import Plan

IGNORED = -100  # a label that counts nowhere, transformers' and torch's
_MODULUS = 2**31 - 1  # fingerprints: products of two numbers below it fit int64


@dataclass(frozen=True, eq=False)
class Whole:
    """The arguments of one pass that have a place in the sequence.

    Args:
        name: "input_ids" or "inputs_embeds".
        x: [B, S] or [B, S, hidden].
        documents: packed documents, as `Mask` has them, or None; padding is not among them.
        position_ids: [1 or B, S], or None: global positions, counted from the start of each document.
        targets: [B, S], labels shifted by one, or None.
        padding: [B, S], the attention_mask, or None.
        num_items: fp64 [], num_items_in_batch, or None.
    """

    name: str
    x: Tensor
    documents: Any
    position_ids: Tensor | None
    targets: Tensor | None
    padding: Tensor | None
    num_items: Tensor | None

    def fingerprint(self) -> Tensor:
        """int64 [FINGERPRINT], at least 0, equal where the arguments are (of embeddings the shape alone is compared).

        The last two, as `Ranks.compare` wants them, are of targets and num_items: 0 where there are none.
        """
        x = self.x if not self.x.is_floating_point() else torch.tensor(self.x.shape, device=self.x.device)
        none = torch.zeros((), dtype=torch.int64, device=x.device)
        num_items = None if self.num_items is None else self.num_items.view(torch.int64)[None]
        parts = (x, self.position_ids, self.padding, self.targets, num_items)
        documents = torch.full_like(none, zlib.crc32(repr(self.documents).encode()))
        return torch.stack([documents, *(none if y is None else 1 + _digest(y) for y in parts)])

    def shard_positions(self, plan: Plan) -> Tensor | None:
        """This rank's position_ids: those given; else None, unless documents are packed."""
        if self.position_ids is not None:
            return plan.shard(self.position_ids)
        if self.documents is None:
            return None
        counted = _counted(self.documents, plan.dealing.positions(plan.rank), plan.seqlen)
        return torch.from_numpy(counted).to(self.x.device)


def read(given: dict[str, Any]) -> Whole:
    """The Whole of a model's arguments; takes out those that the model is not to see.

    Raises:
        ValueError: an argument is wrong or cannot be honoured; names it.
    """
    name = "input_ids" if given.get("input_ids") is not None else "inputs_embeds"
    x = given.get(name)
    if not isinstance(x, Tensor) or x.ndim != (2 if name == "input_ids" else 3):
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name}: wanted input_ids [B, S] or inputs_embeds [B, S, hidden] of whole sequences, got {got}"
        )
    if given.get("use_cache") or given.get("past_key_values") is not None:
        raise ValueError("use_cache: wanted False within context_parallel (sequence_parallel serves caches), got one")
    B, S = x.shape[:2]
    labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
    documents, position_ids = given.pop("documents", None), given.pop("position_ids", None)
    padding = given.get("attention_mask")
    for key, wanted in (("labels", labels), ("shift_labels", shifted), ("attention_mask", padding)):
        if wanted is not None and (not isinstance(wanted, Tensor) or wanted.shape != (B, S)):
            got = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
            raise ValueError(f"{key}: wanted the whole sequences', [{B}, {S}], got {got}")
    num_items = _number(given.pop("num_items_in_batch", None), x.device)
    targets = shifted
    if labels is not None and shifted is None:
        targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    documents = _documents(documents, position_ids, padding, B, S)
    return Whole(name, x, documents, position_ids, targets, padding, num_items)


def _number(given: Any, device: torch.device) -> Tensor | None:
    """num_items_in_batch on the device, fp64 []."""
    if given is None:
        return None
    if not isinstance(given, int | float | Tensor) or (isinstance(given, Tensor) and given.numel() != 1):
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"num_items_in_batch: wanted one number, got {got}")
    return torch.as_tensor(given, device=device).double().reshape(())


def _documents(documents: Any, position_ids: Any, padding: Tensor | None, B: int, S: int) -> Any:
    """Packed documents, given or from position_ids, which must be what they say; None where nothing is packed."""
    mask = Mask(documents=documents)
    mask.check(S)
    if mask.batch not in (None, B):
        raise ValueError(f"documents: wanted lengths, or lengths for each of {B} batch rows, got {mask.batch} rows")
    given = mask.documents
    padded = None if padding is None else padding_documents(padding)
    if padded is not None and given is not None:
        raise ValueError("attention_mask: wanted ones beside documents (make the padding one), got zeros")
    if position_ids is None:
        return given
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape not in ((1, S), (B, S)):
        got = list(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise ValueError(f"position_ids: wanted the whole sequences', [1 or {B}, {S}], got {got}")
    host = position_ids.cpu().numpy()
    found = given
    if given is None and padded is None:
        begins = np.diff(host, axis=1, prepend=host[:, :1] - 1) != 1
        begins[:, 0] = True
        rows = tuple(tuple(np.diff([*np.flatnonzero(row), S]).tolist()) for row in begins)
        found = None if all(len(row) == 1 for row in rows) else rows[0] if len(set(rows)) == 1 else rows
    free = np.zeros((1, 1), bool) if padded is None or padding is None else padding.cpu().numpy() == 0
    everywhere = np.arange(S)
    if not any(((host == wanted) | free).all() for wanted in (everywhere, _counted(found or padded, everywhere, S))):
        raise ValueError(
            "position_ids: wanted positions of the whole sequence, or counted from the start of each document, got "
            "others: rotary embeddings would be wrong"
        )
    return found


def _counted(documents: Any, positions: Any, seqlen: int) -> Any:
    """Positions counted from the start of each document: int64 [1 or B, n]."""
    begins = Mask(causal=False, documents=documents).bounds(positions, seqlen)[0]
    return np.atleast_2d(positions - begins)


def _digest(x: Tensor) -> Tensor:
    """A number in [0, 2**31 - 1) that other contents, or another order of them, hardly ever share."""
    flat = x.reshape(-1).long()
    weights = torch.arange(1, flat.numel() + 1, device=x.device) * 40503 % _MODULUS
    mixed = ((flat + 12345) % _MODULUS) * weights % _MODULUS
    return (mixed.sum() + x.shape[-1] * 7919 + x.numel()) % _MODULUS
