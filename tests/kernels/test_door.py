"""The door refuses what is wrong by name, and dispatch says who serves a call and why others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringfa3_kernels import Partial, Unsupported, Visible, attend, attend_backward, dispatch, door, quantize, row_delta
from ringfa3_kernels.call import Call

Q = torch.ones(2, 5, 4, 16)
K = torch.ones(2, 7, 2, 16)
ROWS = torch.zeros(5, dtype=torch.int32)
EMPTY = Partial.empty(Q)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": None}, "q: wanted a Tensor, got NoneType"),
        ({"k": K[0]}, r"k: wanted 4 dimensions \[B, S, H, D\], got shape \[7, 2, 16\]"),
        ({"q": Q.int()}, "q: wanted dtype .*, got torch.int32"),
        ({"v": K[:, 1:]}, r"v: wanted k's shape \[2, 7, 2, 16\], got \[2, 6, 2, 16\]"),
        ({"v": K.half()}, "v: wanted q's dtype torch.float32, got torch.float16"),
        ({"k": K.to("meta")}, "k: wanted q's device cpu, got meta"),
        ({"k": K[:1], "v": K[:1]}, "k: wanted q's batch size 2, got 1"),
        ({"k": K[..., :8], "v": K[..., :8]}, "k: wanted q's head_dim 16, got 8"),
        ({"q": Q[:, :, :3]}, "q: wanted a number of heads that is a multiple of k's 2, got 3"),
        ({"k": K[:, :, :0], "v": K[:, :, :0]}, "k: wanted at least one head, got 0"),
        ({x: K[:, :, :0] for x in "qkv"}, "q: wanted at least one head, got 0"),
        ({x: torch.ones(1, 3, 1, 264) for x in "qkv"}, "q: wanted a head_dim .* from 8 to 256, got 264"),
        ({x: torch.ones(1, 3, 1, 20) for x in "qkv"}, "q: wanted a head_dim that is a multiple of 8 .*, got 20"),
        ({"q": Q.clone().requires_grad_()}, "q: wanted no requires_grad"),
        ({"visible": "causal"}, "visible: wanted a Visible or None, got str"),
        ({"visible": Visible.full(4, 7)}, r"visible: wanted bounds \[5\] or \[2, 5\], got \[4\]"),
        ({"visible": Visible(ROWS.expand(3, 5), ROWS.expand(3, 5))}, r"visible: wanted .* or \[2, 5\], got \[3, 5\]"),
        ({"visible": Visible.full(5, 7, "meta")}, "visible: wanted q's device cpu, got meta"),
        ({"visible": Visible(ROWS, ROWS + 8)}, r"Visible hi: wanted values in \[0, 7\], got 8..8"),
        ({"visible": Visible.causal(5, 9)}, r"Visible hi: wanted values in \[0, 7\], got 5..9"),
        ({"visible": Visible.full(5, 6)}, "Visible kind: wanted 'intervals' for bounds not full over 7 keys"),
        ({"softcap": -1.0}, "softcap: wanted 0 .* or a positive number, got -1.0"),
        ({"softcap": float("nan")}, "softcap: wanted 0 .* or a positive number, got nan"),
        ({"scale": float("inf")}, "scale: wanted a finite number or None, got inf"),
        ({"out_dtype": torch.float16}, "out_dtype: wanted torch.float32 or q's torch.float32, got torch.float16"),
        ({"into": EMPTY.out}, "into: wanted a Partial, got Tensor"),
        ({"into": Partial(EMPTY.out.half(), EMPTY.lse)}, "into.out: wanted torch.float32 .*, got torch.float16"),
        ({"into": Partial(EMPTY.out, EMPTY.lse.mT)}, r"into.lse: wanted .* \[2, 4, 5\] .*, got .* \[2, 5, 4\]"),
        ({"impl": "magic"}, "impl: wanted 'auto' or one of .*'aten', 'reference', got 'magic'"),
    ],
    ids=str,
)
def test_attend_refuses(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": K, "v": K, **changed}
    with pytest.raises(ValueError, match=message):
        attend(**arguments)


def backward_arguments() -> dict[str, Any]:
    return {
        "dout": Q,
        "q": Q,
        "k": K,
        "v": K,
        "lse": EMPTY.lse,
        "delta": EMPTY.lse,
        "dq": torch.zeros_like(Q),
        "dk": torch.zeros_like(K),
        "dv": torch.zeros_like(K),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dout": Q.half()}, "dout: wanted torch.float32 .*, got torch.float16"),
        ({"dout": Q[:, 1:]}, r"dout: wanted .* \[2, 5, 4, 16\] .*, got .* \[2, 4, 4, 16\]"),
        ({"lse": EMPTY.lse.double()}, "lse: wanted torch.float32 .*, got torch.float64"),
        ({"delta": None}, "delta: wanted a Tensor, got NoneType"),
        ({"delta": EMPTY.lse[:1]}, r"delta: wanted .* \[2, 4, 5\] .*, got .* \[1, 4, 5\]"),
        ({"dq": Q.half()}, "dq: wanted torch.float32 .*, got torch.float16"),
        ({"dk": torch.zeros_like(Q)}, r"dk: wanted .* \[2, 7, 2, 16\] .*, got .* \[2, 5, 4, 16\]"),
        ({"dv": None}, "dv: wanted a Tensor, got NoneType"),
        ({"dk": torch.zeros(2, 2, 7, 16).mT.mT.transpose(1, 2)}, "dk: wanted a contiguous tensor .*, got strides"),
        ({"softcap": -3}, "softcap: wanted"),
        ({"visible": Visible(ROWS, ROWS + 8)}, r"Visible hi: wanted values in \[0, 7\]"),
        ({"impl": "magic"}, "impl: wanted"),
    ],
    ids=str,
)
def test_attend_backward_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend_backward(**(backward_arguments() | changed))


def test_gradients_that_add_up_are_wide_and_of_one_dtype() -> None:
    x = {name: t.bfloat16() if name in {"dout", "q", "k", "v"} else t for name, t in backward_arguments().items()}
    narrow = {name: x[name].bfloat16() for name in ("dq", "dk", "dv")}
    with pytest.raises(ValueError, match=r"dq: wanted torch.float32 .*, got torch.bfloat16"):
        attend_backward(**(x | narrow))
    with pytest.raises(ValueError, match=r"dv: wanted torch.bfloat16 .*, got torch.float32"):
        attend_backward(**(x | narrow | {"dv": x["dv"]}), accumulate=False)
    attend_backward(**(x | narrow), accumulate=False)


@pytest.mark.parametrize("impl", ["auto", "aten", "reference"])
@pytest.mark.parametrize("shape", [(0, 5, 4, 16), (2, 0, 4, 16), (2, 5, 0, 16)], ids=str)
def test_nothing_is_asked_and_nothing_happens(shape: tuple[int, ...], impl: str) -> None:
    q, k = torch.ones(shape), torch.ones(shape[0], 7, 2, 16)
    partial = attend(q, k, k, impl=impl)
    assert partial.out.shape == shape
    grads = [torch.full_like(x, torch.nan) for x in (q, k, k)]
    delta = row_delta(q, partial.out)
    dq, dk, dv = grads
    attend_backward(q, q, k, k, partial.lse, delta, dq=dq, dk=dk, dv=dv, accumulate=False, impl=impl)
    assert not any(g.any() for g in grads)


def test_row_delta_is_the_sum_over_a_row_less_the_gradient_of_lse() -> None:
    dout, out, dlse = torch.randn(2, 5, 4, 8).bfloat16(), torch.randn(2, 5, 4, 8), torch.randn(2, 4, 5)
    wanted = (dout.float() * out).sum(-1).transpose(1, 2)
    torch.testing.assert_close(row_delta(dout, out), wanted)
    torch.testing.assert_close(row_delta(dout, out, dlse), wanted - dlse)
    assert row_delta(dout, out, dlse).is_contiguous()


def call(**changed: Any) -> Call:
    facts: dict[str, Any] = {
        "direction": "forward",
        "device": "cpu",
        "capability": (0, 0),
        "dtype": torch.float32,
        "B": 1,
        "Sq": 8,
        "Sk": 8,
        "Hq": 2,
        "Hkv": 1,
        "D": 16,
        "batched_visible": False,
        "softcap": False,
        "into": False,
        "out_dtype": torch.float32,
        "accumulate": False,
        "deterministic": False,
        "aligned": True,
    }
    return Call(**(facts | changed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_auto_is_aten_on_the_cpu_even_where_portable_would_run_in_an_interpreter(
    dtype: torch.dtype, direction: str
) -> None:
    assert dispatch.choose(call(dtype=dtype, direction=direction)).NAME == "aten"


def test_every_implementation_that_refuses_is_named_with_its_reason() -> None:
    with pytest.raises(Unsupported, match=r"no implementation serves this forward call \(.*aten: .*CPU only.*\)") as e:
        dispatch.choose(call(device="xpu", dtype=torch.float64))
    assert "portable: " in str(e.value)
    assert "reference" not in str(e.value)


def test_why_not_is_a_reason_or_none() -> None:
    assert dispatch.why_not("aten", call()) is None
    assert dispatch.why_not("reference", call(device="cuda", dtype=torch.float64)) is None
    assert "CPU only" in (dispatch.why_not("aten", call(device="cuda", capability=(9, 0))) or "")
    assert "float64" in (dispatch.why_not("portable", call(dtype=torch.float64)) or "")


def test_a_named_implementation_never_falls_back() -> None:
    q = torch.ones(1, 4, 2, 16, dtype=torch.float64)
    with pytest.raises(Unsupported, match="portable: "):
        attend(q, q, q, impl="portable")
    with pytest.raises(Unsupported, match="portable: "):  # not even where there is nothing to do
        attend(q, q[:, :0], q[:, :0], impl="portable")
    assert attend(q, q, q).out.dtype == torch.float64


def test_what_holds_nothing_is_aligned() -> None:
    """Strides of an empty tensor say nothing: no rows of fp8 values in "keys" order are [B, H, D, 0], strides of 1."""
    q = torch.empty(1, 0, 2, 64)
    assert door.is_aligned(quantize(q, q, q, v_order="keys")[2].data)
    assert door.is_aligned(torch.empty(1, 4, 2, 64))
    assert not door.is_aligned(torch.empty(1, 4, 2, 65)[..., 1:])
