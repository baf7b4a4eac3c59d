"""Options that several commands have, checked before anything runs: a refusal names the option, wanted and got."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # torch's names, and the short ones


def gpus_for(device: str) -> int:
    """GPUs that --device lets a command use: 0 means CPU ranks.

    Raises:
        ValueError: "cuda" on a machine without a GPU.
    """
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and gpus == 0:
        raise ValueError("--device: wanted 'cuda' on a machine with a GPU, got a machine without")
    return gpus


def checked_head_dim(D: int) -> int:
    """The --head-dim, if `ring_attention` takes it."""
    if not 8 <= D <= 256 or D % 8:
        raise ValueError(f"--head-dim: wanted a multiple of 8 from 8 to 256, got {D}")
    return D


def checked_transport(option: str, name: str, *, more: str = "") -> str:
    """The name, if `ring_attention` has such a transport.

    Args:
        more: what the option takes beside them.
    """
    from ringfa3.transport import choose

    try:
        choose.check(name)
    except ValueError:
        names = ", ".join(choose.NAMES)
        raise ValueError(f"{option}: wanted {names}, hierarchical:RANKS, pull:BUFFERS{more}, got {name!r}") from None
    return name


def dtype_name(text: str) -> str:
    """torch's name of a dtype, from either of its names; argparse's type=, before its choices=."""
    return {short: name for name, short in DTYPES.items()}.get(text, text)


def made_folder(option: str, path: Path) -> Path:
    """The folder, made where it is missing: not to be refused after an hour of measuring."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(path, os.W_OK | os.X_OK) else "not writable"
    except OSError as error:
        why = error.strerror or type(error).__name__
    if why:
        raise ValueError(f"{option}: wanted a folder that can be made and written to, got {path} ({why})")
    return path


@contextmanager
def reading(name: str) -> Iterator[None]:
    """A model's files are read in here: where they are missing or broken, a ValueError says so in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, IndexError, SafetensorError) as error:  # IndexError: a GGUF file that ends early
        if isinstance(error, ValueError) and refuses(error):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--model: wanted one whose files can be read, got {name} ({why})") from error


def refuses(error: ValueError) -> bool:
    """Whether it is a refusal as all of ours are: who reads it needs no traceback."""
    return re.match(r"[^\n]+: wanted .*, got ", str(error), re.DOTALL) is not None
