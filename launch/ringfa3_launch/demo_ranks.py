"""What the demo's processes do: each rank attends to a long sequence and reads a prompt; one reads it alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch.generate_ranks import pages_for
from ringfa3_launch.options import reading as files_read

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch
    from torch import Tensor

    from ringfa3 import Plan
    from ringfa3_launch.rank import RankInfo

Tell = Callable[[str, float, str], None]  # phase, share of it that is done, what is under way

CHUNK = 2048  # tokens of the prompt that are read at once
PAGE = 64  # tokens in a page of the cache
BLOCK = 1024  # positions that are drawn together, so that a rank draws its own alone


@dataclass(frozen=True)
class Reading:
    """A prompt for a model.

    Args:
        folder: the model's, plain.
        ids: the prompt.
        dtype: of weights and activations, as torch names it.
        answer_tokens: at most as many are generated.
        stop: ids that end an answer.
    """

    folder: Path
    ids: list[int]
    dtype: str
    answer_tokens: int
    stop: frozenset[int]


@dataclass(frozen=True)
class Long:
    """Random queries, keys and values: a causal attention too long to check but by samples.

    Args:
        seqlen, Hq, Hkv, D: sizes.
        dtype: as torch names it.
        samples: positions whose rows are checked, ascending.
    """

    seqlen: int
    Hq: int
    Hkv: int
    D: int
    dtype: str
    samples: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Of the two products over visible pairs."""
        return 2.0 * self.seqlen * (self.seqlen + 1) * self.D * self.Hq

    def draw(self, name: str, begin: int, end: int, device: torch.device) -> Tensor:
        """Positions begin..end of q, k or v, [1, n, H, D]; the same whoever draws them (on one kind of device)."""
        import torch

        heads = self.Hq if name == "q" else self.Hkv
        blocks = []
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            source = torch.Generator(device).manual_seed(block * 3 + "qkv".index(name))
            x = torch.randn(1, BLOCK, heads, self.D, generator=source, device=device)
            low = block * BLOCK
            blocks.append(x[:, max(begin - low, 0) : end - low].to(getattr(torch, self.dtype)))
        return torch.cat(blocks, 1)


@dataclass(frozen=True)
class Attended:
    """What the long attention was like on a rank.

    Args:
        rows: its share.
        seconds: from when all ranks began until all were done.
        bytes: memory at the peak beyond what the rank held before; its q, k and v count.
        sampled: the sampled rows that it holds, [n, Hq, D], and their positions [n].
    """

    rows: int
    seconds: float
    bytes: int
    sampled: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Read:
    """What reading and answering was like on a rank.

    Args:
        rows: its share of the prompt.
        seconds, answer_seconds: of the prefill, and of the generation.
        bytes: all its memory at the peak.
        answer: generated ids, with the one that ended it.
        logits: fp32 [V] for the token after the prompt; rank 0 only.
    """

    rows: int
    seconds: float
    answer_seconds: float
    bytes: int
    answer: tuple[int, ...]
    logits: Tensor | None


@dataclass(frozen=True)
class Alone:
    """What reading and answering was like for one process with PyTorch's attention.

    Args:
        seconds: of the prefill.
        answer: generated ids, with the one that ended it; in the ranks' dtype.
        logits: fp32 [V] for the token after the prompt, by the dtype of the model.
        steps: fp32 [n, V] that the answer's tokens were chosen by.
    """

    seconds: float
    answer: tuple[int, ...]
    logits: dict[str, Tensor]
    steps: Tensor


def work(info: RankInfo, reading: Reading, long: Long, teller: Connection) -> tuple[str, Attended, Read]:
    """A rank's life in the demo: its device's name and how it went.

    Rank 0 sends (phase, share of it that is done, what is under way) by teller. The long attention comes first: what
    memory a model leaves behind would hide what it takes.
    """
    import torch
    import torch.distributed as dist

    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def tell(phase: str, share: float, text: str) -> None:
        if info.rank == 0:
            teller.send((phase, share, text))

    with torch.inference_mode():
        attended = attend(long, device, tell)
        read_ = read(info, reading, device, tell)
    return torch.cuda.get_device_name(device) if on_gpu else "CPU", attended, read_


def attend(long: Long, device: torch.device, tell: Tell) -> Attended:
    """ring_attention over the long case."""
    import torch
    import torch.distributed as dist

    from ringfa3 import Mask, plan, ring_attention

    def run(shares: Plan) -> tuple[Tensor, float]:
        runs = shares.dealing.runs[shares.rank]
        q, k, v = (torch.cat([long.draw(name, a, b, device) for a, b, _ in runs], 1) for name in "qkv")
        dist.barrier()
        tell("long", 0.1, f"{shares.world} ranks attend to {shares.seqlen} positions")
        start = time.perf_counter()
        out = ring_attention(q, k, v, plan=shares)
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return out, time.perf_counter() - start

    shares = plan(Mask(), "zigzag", long.seqlen, device=device)
    # compiles on a GPU; brings code and buffers into memory that are not this attention's
    run(shares if device.type == "cuda" else plan(Mask(), "zigzag", min(1024, long.seqlen)))
    held = forget_peak(device)
    out, seconds = run(shares)
    used = peak(device) - held
    mine = torch.isin(shares.positions, torch.tensor(long.samples, device=device))
    sampled = (out[0, mine].cpu(), shares.positions[mine].cpu())
    return Attended(shares.lengths[shares.rank], seconds, used, sampled)


def read(info: RankInfo, reading: Reading, device: torch.device, tell: Tell) -> Read:
    """The prompt, chunk by chunk, of which each rank computes and keeps its share; then the answer, token by token."""
    import torch.distributed as dist

    from ringfa3.inference import Runner

    forget_peak(device)
    tell("read", 0, "loading the model")
    n = len(reading.ids)
    pages = pages_for(n, reading.answer_tokens, info.world, CHUNK, PAGE)
    runner = Runner(load(reading.folder, reading.dtype, device), pages=pages, page_size=PAGE)
    runner.create(0)
    dist.barrier()
    start = time.perf_counter()
    for begin in range(0, n, CHUNK):
        tell("read", begin / n, f"{info.world} ranks read the text")
        logits = runner.prefill(0, reading.ids[begin : begin + CHUNK])
    first = logits.cpu()  # waits for the device
    seconds = time.perf_counter() - start
    tell("read", 1, f"{info.world} ranks read the text")
    used, rows = peak(device), runner.pages.local_length(info.rank, 0)
    start = time.perf_counter()
    answer, _ = generate(
        reading, logits, lambda token: runner.decode([0], [[token]])[0, 0],
        lambda share: tell("answer", share, "the model answers"),
    )  # fmt: skip
    kept = first if info.rank == 0 else None
    return Read(rows, seconds, time.perf_counter() - start, used, answer, kept)


def read_alone(reading: Reading, place: str, tell: Tell) -> Alone:
    """The same model in one process with PyTorch's attention; its first logits also in fp32."""
    import torch

    device = torch.device(place)
    ids = torch.tensor([reading.ids], device=device)
    logits: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(("float32", reading.dtype)):
        model = load(reading.folder, dtype, device)
        hooks = watch(model, lambda share: tell("alone", share, "one process reads the text, to compare"))
        start = time.perf_counter()
        with torch.inference_mode():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            logits[dtype] = out.logits[0, -1].float().cpu()
            seconds = time.perf_counter() - start
            for hook in hooks:
                hook.remove()
            if dtype == reading.dtype:
                step = partial(_step, model, out.past_key_values, device)
                answer, steps = generate(reading, out.logits[0, -1], step, lambda share: None)
    return Alone(seconds, answer, logits, steps)


def _step(model: Any, cache: Any, device: torch.device, token: int) -> Tensor:
    """The logits after one more token; the model's key-value cache grows."""
    import torch

    logits: Tensor = model(input_ids=torch.tensor([[token]], device=device), past_key_values=cache).logits[0, -1]
    return logits


def generate(
    reading: Reading, logits: Tensor, step: Callable[[int], Tensor], tell: Callable[[float], None]
) -> tuple[tuple[int, ...], Tensor]:
    """The likeliest tokens after the prompt, up to and with one that ends an answer.

    Args:
        logits: [V] for the first token.
        step: appends a token; gives the logits [V] for the next.
        tell: is told which share of the tokens is there.

    Returns:
        Ids, and the logits that they were chosen by, fp32 [n, V] on the CPU.
    """
    import torch

    answer: list[int] = []
    steps: list[Tensor] = []
    while len(answer) < reading.answer_tokens:
        steps.append(logits.float().cpu())
        answer.append(int(steps[-1].argmax()))
        tell(len(answer) / reading.answer_tokens)
        if answer[-1] in reading.stop:
            break
        if len(answer) < reading.answer_tokens:
            logits = step(answer[-1])
    return tuple(answer), torch.stack(steps)


def load(folder: Path, dtype: str, device: torch.device) -> Any:
    """The model of a plain folder, ready to be asked."""
    import torch

    from ringfa3.inference.model import read

    with files_read(folder.resolve().name):
        model = read(folder, dtype=getattr(torch, dtype))
    return model.to(device)


def watch(model: Any, tell: Callable[[float], None]) -> list[Any]:
    """Hooks that tell after each of the model's layers which share of them is done."""
    from torch.nn import ModuleList

    n = model.config.get_text_config().num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, ModuleList) and len(m) == n)
    return [layer.register_forward_hook(lambda *_, i=i: tell(i / n)) for i, layer in enumerate(layers, 1)]


def peak(device: torch.device) -> int:
    """Bytes at this process's peak: of the GPU's memory, or resident."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak can be forgotten
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> int:
    """Start a new peak where the system can; the bytes held now, or at the old peak."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: else what follows may be served from memory that was freed but kept
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)
