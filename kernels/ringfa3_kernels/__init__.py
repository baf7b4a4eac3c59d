"""Exact attention over one shard of keys, on one GPU: output and log-sum-exp, for the next shard to continue."""

from ringfa3_kernels.decode_door import decode
from ringfa3_kernels.door import attend, attend_backward, row_delta
from ringfa3_kernels.positional import Dropout
from ringfa3_kernels.quantized import Quantized, dequantize, quantize, quantize_keys, quantize_queries
from ringfa3_kernels.types import Partial, Unsupported, Visible, merge

__all__ = [
    "Dropout",
    "Partial",
    "Quantized",
    "Unsupported",
    "Visible",
    "attend",
    "attend_backward",
    "decode",
    "dequantize",
    "merge",
    "quantize",
    "quantize_keys",
    "quantize_queries",
    "row_delta",
]
