"""Texts on one rank: on GPUs it decodes under CUDA graphs, captured before it serves, unless it is told not to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringfa3.inference.announce import Announcer
from ringfa3_launch.cluster import texts
from ringfa3_launch.cluster.settings import Settings


class Seen(Exception):
    """Nothing of the engine is wanted here."""


def made(monkeypatch: pytest.MonkeyPatch, device: str, **options: Any) -> list[Any]:
    """What the runner was told of graphs, and what it was to capture."""
    told: list[Any] = []

    class Runner:
        def __init__(self, model: Any, **options: Any) -> None:
            told.append(options["graphs"])

        def warm(self, most: int) -> None:
            told.append(most)

    def engine(*_: Any, **__: Any) -> None:
        raise Seen

    monkeypatch.setattr(texts, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(texts, "Runner", Runner)
    monkeypatch.setattr(texts, "Engine", engine)
    wake: Callable[[], None] = lambda: None  # noqa: E731
    with pytest.raises(Seen):
        texts.Texts(Settings(model="m", pages=9, **options), torch.device(device), Announcer(), wake=wake)
    return told


def test_graphs_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(monkeypatch, "cuda") == [True, 64]
    assert made(monkeypatch, "cuda", max_running=5) == [True, 5]
    assert made(monkeypatch, "cuda", max_running=500) == [True, 64]
    assert made(monkeypatch, "cuda", graphs=False) == [False]
    assert made(monkeypatch, "cpu") == [False]
