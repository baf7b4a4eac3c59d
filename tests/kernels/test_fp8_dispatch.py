"""What fp8 the Hopper kernels say they read: asked as dispatch asks, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringfa3_kernels import dispatch
from ringfa3_kernels.call import Call

SERVED: dict[str, Any] = {
    "direction": "forward",
    "device": "cuda",
    "capability": (9, 0),
    "dtype": torch.float8_e4m3fn,
    "B": 1,
    "Sq": 300,
    "Sk": 300,
    "Hq": 4,
    "Hkv": 2,
    "D": 128,
    "batched_visible": False,
    "softcap": False,
    "into": True,
    "out_dtype": torch.float32,
    "accumulate": False,
    "deterministic": False,
    "aligned": True,
    "blocks": (128, 128, 128),
    "v_order": "keys",
}


@pytest.mark.parametrize("change", [{}, {"blocks": (0, 0, 0)}, {"softcap": True}, {"D": 80}], ids=str)
def test_hopper_serves(change: dict[str, Any]) -> None:
    assert dispatch.why_not("hopper", Call(**SERVED | change)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v_order": "rows"}, "v in order 'keys'"),
        ({"blocks": (128, 128, 0)}, "scales of one kind"),
        ({"dtype": torch.float8_e5m2}, "float8_e4m3fn, got torch.float8_e5m2"),
        ({"D": 136}, "head_dim up to 128, whose sums it can keep in fp32, got 136"),
        ({"aligned": False}, "multiples of 16 bytes"),
        ({"capability": (8, 9)}, "compute capability 9.0, got cuda 8.9"),
        ({"dtype": torch.float32, "blocks": ()}, "needs bfloat16 or float16"),
    ],
    ids=str,
)
def test_hopper_says_what_it_lacks(change: dict[str, Any], reason: str) -> None:
    assert reason in str(dispatch.why_not("hopper", Call(**SERVED | change)))
