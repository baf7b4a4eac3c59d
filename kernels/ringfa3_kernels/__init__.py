"""Exact attention over one shard of keys, on one GPU: output and log-sum-exp, for the next shard to continue."""

from ringfa3_kernels.decode_door import decode
from ringfa3_kernels.door import attend, attend_backward, row_delta
from ringfa3_kernels.types import Partial, Unsupported, Visible, merge

__all__ = ["Partial", "Unsupported", "Visible", "attend", "attend_backward", "decode", "merge", "row_delta"]
