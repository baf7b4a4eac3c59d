"""Presets: ring_attention takes their options as they are, and none of them changes the answer."""

import dataclasses
import inspect

import pytest
import torch

from ringfa3 import presets, ring_attention, shard
from ringfa3_kernels import Visible, attend

NAMES = ["short_context", "long_context", "memory_efficient"]


def run(rank, world, options):
    """Error of a preset's output against one device over the whole sequence."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 33, 2, 16).unbind()
    mine = (shard(x, layout=options["layout"]) for x in (q, k, v))
    out = ring_attention(*mine, **options, impl="reference")
    expected = shard(attend(q, k, v, Visible.causal(33, 33), impl="reference").out, layout=options["layout"])
    return float((out - expected).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_exact(world, name):
    preset = getattr(presets, name)
    assert set(preset.options()) <= set(inspect.signature(ring_attention).parameters)
    assert max(world(2)(run, preset.options())) < 1e-5


def test_presets_are_values():
    assert len({getattr(presets, name) for name in NAMES}) == 3
    variant = dataclasses.replace(presets.long_context, deterministic=True)
    assert variant.options() == {"layout": "zigzag", "transport": "auto", "deterministic": True}
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.long_context.layout = "striped"
