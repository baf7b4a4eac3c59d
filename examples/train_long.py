"""Train a small Llama on long sequences of packed documents: FSDP2 over all ranks, context parallelism within.

    launch/torchrun.sh examples/train_long.py --steps 60                        2 CPU ranks, or all GPUs
    launch/torchrun.sh --nproc 2 examples/train_long.py --seqlen 128K --hidden 2048 --layers 16 --heads 16 \\
        --kv-heads 4 --checkpointing

The text is the prose of Python's language reference (or --text FILE), in bytes; each sequence holds several documents
that do not see each other. --cp ranks share a sequence, the others have sequences of their own; the loss does not
depend on how many do, and neither do checkpoints: the same command goes on from the newest one in --out, also on
another number of ranks (where --cp is less than all, say --batch, which must not change). --out gets curve.jsonl (a
line a step), curve.png, arguments.json and checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from ringfa3.integrations.context_parallel import context_parallel
from ringfa3_launch.bench.case import parse_size
from ringfa3_launch.haystack import document
from ringfa3_launch.rank import RankInfo, init

BEGIN = 256  # the token that begins a document; the others are bytes
VOCABULARY = 257
PEERS = ("torch", "torch-cudnn", "torch-fa3")
Step = Callable[[dict[str, Any]], float]
# What the curve depends on: a run that goes on must have it from the one before
SHAPING = (
    "text", "seqlen", "batch", "document", "seed", "hidden", "layers", "heads", "kv_heads", "steps", "lr", "warmup",
)  # fmt: skip
Tell = Callable[[int, float], None]


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = options.add_argument_group("the job")
    job.add_argument("--steps", type=int, default=60, help="optimizer steps in all, resumed ones included (60)")
    job.add_argument("--out", type=Path, default=Path("train_long"), help="folder, shared by all hosts (train_long)")
    job.add_argument("--fresh", action="store_true", help="begin anew, and delete what --out holds of an earlier run")
    job.add_argument("--save-every", type=int, default=20, metavar="N", help="steps between checkpoints (20); 0: none")
    job.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints that are kept (2)")
    job.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where ranks run (auto)")
    job.add_argument("--cp", type=int, metavar="N", help="ranks that share a sequence (all); a divisor of the ranks")
    job.add_argument("--layout", default="zigzag", help="how a sequence is dealt to them (zigzag)")
    job.add_argument("--transport", default="auto", help="how keys and values travel (auto); see ring_attention")
    job.add_argument("--peer", choices=PEERS, help="torch's context_parallel instead of ringfa3 (CUDA, --document 0)")
    job.add_argument("--report", type=Path, metavar="FILE", help="write tokens/s and peak memory of this run, as JSON")
    data = options.add_argument_group("the data")
    data.add_argument("--text", metavar="FILE", help="UTF-8 (prose of Python's language reference)")
    data.add_argument("--seqlen", type=parse_size, default=4096, metavar="N", help="tokens of a sequence (4K)")
    data.add_argument("--batch", type=int, metavar="N", help="sequences a step, on all ranks (one a dp rank)")
    data.add_argument("--document", type=length, metavar="N", help="their mean length (a quarter); 0: no packing")
    data.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    model = options.add_argument_group("the model")
    model.add_argument("--hidden", type=int, default=256, help="width (256)")
    model.add_argument("--layers", type=int, default=4, help="(4)")
    model.add_argument("--heads", type=int, default=4, help="of queries (4)")
    model.add_argument("--kv-heads", type=int, default=2, help="of keys and values (2)")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of matrix products")
    model.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    model.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate (1e-3)")
    model.add_argument("--warmup", type=int, default=10, metavar="N", help="steps up to it; then a cosine down (10)")
    return options


def length(text: str) -> int:
    """A number of tokens, or 0."""
    return 0 if text == "0" else parse_size(text)


def main() -> int:
    """Train; the exit status."""
    args = parser().parse_args()
    info = RankInfo.from_env()
    try:
        with init(info, device=args.device) as device:
            train(args, device, progress(args) if info.rank == 0 else lambda step, loss: None)
    except ValueError as error:
        print(f"train_long.py: {error}", file=sys.stderr)
        return 2
    return 0


def progress(args: argparse.Namespace) -> Tell:
    """Print a line a step."""
    begun = time.perf_counter()

    def tell(step: int, loss: float) -> None:
        print(f"[{step}/{args.steps}] loss {loss:.4f}, {time.perf_counter() - begun:.1f} s", flush=True)

    return tell


def train(args: argparse.Namespace, device: torch.device, tell: Tell) -> list[float]:
    """Train on all ranks of the default process group; the loss of every step, resumed ones included.

    Args:
        tell: is called after every step with its number and loss.

    Raises:
        ValueError: an option is wrong; names it.
    """
    mesh = meshes(args, device)
    dp, row = mesh["dp"].size(), mesh["dp"].get_local_rank()
    batch = args.batch = dp if args.batch is None else args.batch  # resolved: Journal compares it
    if batch < 1 or batch % dp:
        raise ValueError(f"--batch: wanted a multiple of the {dp} dp ranks, got {batch}")
    if args.keep < 1:
        raise ValueError(f"--keep: wanted at least 1 (--save-every 0 saves none), got {args.keep}")
    text = np.frombuffer("\n\n".join(document(args.text)).encode(), np.uint8)
    model = build(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, fused=device.type == "cuda")
    journal = Journal(args, dist.get_rank() == 0)
    done = restore(journal, model, optimizer)
    if args.report and done >= args.steps:
        raise ValueError(f"--report: wanted steps to time, got a run whose {args.steps} steps are done (see --fresh)")
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with attention(args, model, mesh) as compute:
        for step in range(done + 1, args.steps + 1):
            begun = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, args.warmup, args.steps)
            sequences = [sequence(text, args, step, row * (batch // dp) + i) for i in range(batch // dp)]
            loss = compute(collate(sequences, device))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begun)
            journal.add(step, loss)
            tell(step, loss)
            if args.save_every and (step % args.save_every == 0 or step == args.steps):
                save(journal, step, model, optimizer)
    journal.plot()
    if args.report and dist.get_rank() == 0:
        args.report.write_text(json.dumps(report(args, times, batch, device), indent=1) + "\n")
    return journal.losses


def meshes(args: argparse.Namespace, device: torch.device) -> DeviceMesh:
    """The mesh dp x cp."""
    world = dist.get_world_size()
    cp = world if args.cp is None else args.cp
    if cp < 1 or world % cp:
        raise ValueError(f"--cp: wanted a divisor of the {world} ranks, got {cp}")
    check_peer(args, device, cp)
    return init_device_mesh(device.type, (world // cp, cp), mesh_dim_names=("dp", "cp"))


def check_peer(args: argparse.Namespace, device: torch.device, cp: int) -> None:
    """Raise ValueError for what torch's context_parallel cannot do."""
    if args.peer and device.type != "cuda":
        raise ValueError(f"--peer: wanted CUDA (torch's ring covers its operators only) or no peer, got {device.type}")
    if args.peer and (args.document != 0 or args.seqlen % (2 * cp)):
        raise ValueError(
            f"--peer: wanted --document 0 (torch's context_parallel serves no packed documents) and a --seqlen that "
            f"{2 * cp} divides, got {args.document} and {args.seqlen}"
        )


def build(args: argparse.Namespace, device: torch.device) -> Any:
    """The model, the same on all ranks, its parameters sharded over all of them."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.seqlen, bos_token_id=BEGIN, eos_token_id=BEGIN, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(device)
    if args.checkpointing:  # renamed in transformers 5.23
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32)
    everywhere = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("all",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everywhere, mp_policy=policy)
    fully_shard(model, mesh=everywhere, mp_policy=policy)
    return model.train()


def schedule(step: int, warmup: int, steps: int) -> float:
    """The share of the highest learning rate: up in a line, then down to a tenth along a cosine."""
    if step <= warmup:
        return step / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def sequence(text: Any, args: argparse.Namespace, step: int, number: int) -> tuple[Any, tuple[int, ...]]:
    """Tokens [seqlen] of documents from random places of the text, and their lengths: the same for any ranks."""
    random = np.random.default_rng((args.seed, step, number))
    mean = args.seqlen // 4 if args.document is None else args.document
    tokens, lengths = np.full(args.seqlen, BEGIN, np.int64), []
    begin = 0
    while begin < args.seqlen:
        drawn = int(random.exponential(mean)) + 2 if mean else args.seqlen
        end = min(args.seqlen, begin + drawn)
        place = np.arange(end - begin - 1) + random.integers(text.size)
        tokens[begin + 1 : end] = text[place % text.size]  # a text shorter than the document repeats
        lengths.append(end - begin)
        begin = end
    return tokens, tuple(lengths)


def collate(sequences: list[tuple[Any, tuple[int, ...]]], device: torch.device) -> dict[str, Any]:
    """What the model is given: input_ids, labels (none across documents) and documents of whole sequences."""
    ids = torch.from_numpy(np.stack([tokens for tokens, _ in sequences])).to(device)
    lengths = tuple(row for _, row in sequences)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == BEGIN, -100), "documents": lengths}


@contextmanager
def attention(args: argparse.Namespace, model: Any, mesh: DeviceMesh) -> Iterator[Step]:
    """A function that runs forward and backward over whole sequences, and returns the loss of all ranks'."""
    if args.peer:
        from ringfa3_launch.bench.training_peer import torchs

        with torchs(args.peer, model, mesh) as compute:
            yield compute
        return

    def ours(batch: dict[str, Any]) -> float:
        loss = model(**batch).loss
        loss.backward()
        return float(loss.detach())

    with context_parallel(model, mesh, layout=args.layout, transport=args.transport):
        yield ours


class Journal:
    """What --out holds: the curve so far, its plot and the checkpoints; rank 0 writes."""

    def __init__(self, args: argparse.Namespace, writes: bool) -> None:
        self.folder: Path = args.out
        self.keep, self.writes = args.keep, writes
        self.losses: list[float] = []
        arguments = {name: getattr(args, name) for name in SHAPING}
        if writes:
            if args.fresh:
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
                (self.folder / "arguments.json").unlink(missing_ok=True)
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for torso in (self.folder / "checkpoints").glob("*.partial"):
                shutil.rmtree(torso)
        kept = self.folder / "arguments.json"
        held = of_rank_0(json.loads(kept.read_text()) if writes and kept.exists() else {})
        for name, before in held.items():
            if arguments.get(name) != before:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option}: wanted {before}, as in the run that {self.folder} holds, or --fresh, "
                    f"got {arguments.get(name)}"
                )
        if writes:
            kept.write_text(json.dumps(arguments, indent=1) + "\n")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def newest(self) -> int:
        """The step of the newest whole checkpoint; 0 where there is none."""
        found = (self.folder / "checkpoints").glob("step-*")
        return max((int(path.name.removeprefix("step-")) for path in found if path.suffix != ".partial"), default=0)

    def resume(self) -> int:
        """Go on after the newest checkpoint, its step: forget what a run that was killed has written since."""
        step, lines = 0, list[str]()
        if self.writes:  # alone: a shared folder need not show the same to all hosts
            step = self.newest()
            lines = (self.folder / "curve.jsonl").read_text().splitlines()[:step] if step else []
            (self.folder / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines))
        step, lines = of_rank_0((step, lines))
        self.losses = [json.loads(line)["loss"] for line in lines]
        return step

    def add(self, step: int, loss: float) -> None:
        """One more step."""
        self.losses.append(loss)
        if self.writes:
            with (self.folder / "curve.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": loss}) + "\n")

    def plot(self) -> None:
        """Write curve.png, where matplotlib is installed."""
        if not self.writes or not self.losses:
            return
        try:
            import matplotlib
        except ModuleNotFoundError:
            print("no curve.png: matplotlib is not installed", file=sys.stderr)
            return
        matplotlib.use("Agg")  # no display needed
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(range(1, len(self.losses) + 1), self.losses)
        axes.set(xlabel="step", ylabel="loss, nats a byte", title=f"{self.folder.name}, {dist.get_world_size()} ranks")
        figure.savefig(self.folder / "curve.png", dpi=100)
        pyplot.close(figure)


def of_rank_0(x: Any) -> Any:
    """What rank 0 gives, on all ranks."""
    box = [x]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def save(journal: Journal, step: int, model: Any, optimizer: Any) -> None:
    """A checkpoint by all ranks; it gets its name once it is whole."""
    whole = journal.checkpoint(step)
    partial = whole.with_suffix(".partial")
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
    if journal.writes:
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)
        for old in sorted(whole.parent.glob("step-*"))[: -journal.keep or None]:
            if old.suffix != ".partial":
                shutil.rmtree(old)
    journal.plot()
    dist.barrier()


def restore(journal: Journal, model: Any, optimizer: Any) -> int:
    """Load the newest checkpoint, written by any number of ranks; its step, 0 where there is none."""
    step = journal.resume()
    if step:
        weights, moments = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=journal.checkpoint(step))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    dist.barrier()
    return step


def report(args: argparse.Namespace, times: list[float], batch: int, device: torch.device) -> dict[str, Any]:
    """Speed and memory of this run; the first steps, which compile and connect, do not count."""
    kept = times[2:] if len(times) > 4 else times
    speeds = sorted(batch * args.seqlen / seconds for seconds in kept)
    return {
        "attention": args.peer or "ringfa3",
        "tokens_per_second": statistics.median(speeds),
        "spread": (speeds[int(0.8 * (len(speeds) - 1))] - speeds[int(0.2 * (len(speeds) - 1))]) / 2,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "steps": len(kept),
        "ranks": dist.get_world_size(),
    }


if __name__ == "__main__":
    sys.exit(main())
