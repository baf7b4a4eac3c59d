"""Sequence parallelism: exact attention over one long sequence whose shards lie on many ranks."""

from ringfa3 import operators as operators  # registered with torch.library
from ringfa3.agree import Agreement
from ringfa3.attention import release_buffers, ring_attention
from ringfa3.errors import RankFailed
from ringfa3.fp8 import Fp8
from ringfa3.handle import Handle
from ringfa3.layout import Layout, balanced
from ringfa3.mask import Mask
from ringfa3.plan import Plan, plan
from ringfa3.shards import shard, unshard

__all__ = [
    "Agreement",
    "Fp8",
    "Handle",
    "Layout",
    "Mask",
    "Plan",
    "RankFailed",
    "balanced",
    "plan",
    "release_buffers",
    "ring_attention",
    "shard",
    "unshard",
]
