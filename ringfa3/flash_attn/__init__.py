"""flash-attn's functions by their names, arguments and returns, computed by ringfa3's kernels on one device.

    from ringfa3.flash_attn import flash_attn_func  # instead of: from flash_attn import flash_attn_func

Argument lists are those of flash-attn 2.7 and 2.8. What is more: fp32, gradients of softmax_lse, `deterministic` on
every implementation, CPU tensors. What differs: the softmax_lse of a row that sees no key is -inf (flash-attn's kernels
leave +inf there, except with a cache), other places are dropped for the same seed, and the third thing that
return_attn_probs returns is None.
`bert_padding` is in `ringfa3.bert_padding`.
"""

from ringfa3.flash_attn.batch import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from ringfa3.flash_attn.kvcache import flash_attn_with_kvcache
from ringfa3.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
