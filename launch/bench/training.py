"""Training speed and memory beside torch's context_parallel: examples/train_long.py run by turns with each of them.

Not shipped. On GPUs, about two minutes a run:

    python launch/bench/training.py --nproc 2 --seqlen 128K --out docs/results
    python launch/bench/training.py --device cpu --nproc 2 --seqlen 512 --hidden 32 --layers 1 --rounds 1 \\
        --out /tmp/out                                                  a dry run: torch's ring refuses CPUs, by name

Every run is a process group of its own, so that peak memory is one method's; rounds alternate, and their medians are
compared. Sequences are not packed, as torch's context_parallel could not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringfa3_launch import machine
from ringfa3_launch.bench.case import format_size, parse_size
from ringfa3_launch.bench.report import commit

ROOT = Path(__file__).parents[2]
OURS = "ringfa3"
PEERS = ("torch-fa3", "torch", "torch-cudnn")
MODEL = {"hidden": 2048, "layers": 16, "heads": 16, "kv-heads": 4, "steps": 8, "lr": 3e-4}

Runner = Callable[[Sequence[str], float], tuple[int, str]]


@dataclass
class Method:
    """What the runs of one method gave.

    Args:
        reports: of its runs, as train_long.py writes them.
        losses: a step each, of the last run.
        missing: why it did not run, if so.
    """

    reports: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    missing: str | None = None

    def speed(self) -> float | None:
        """Tokens a second on all ranks together: the median over runs."""
        return statistics.median(r["tokens_per_second"] for r in self.reports) if self.reports else None

    def spread(self) -> float:
        """Half the range over runs; of one run, over its steps."""
        speeds = [r["tokens_per_second"] for r in self.reports]
        return (max(speeds) - min(speeds)) / 2 if len(speeds) > 1 else float(self.reports[0]["spread"])

    def gib(self) -> float | None:
        """A rank's peak memory; None on CPUs."""
        peaks = [r["peak_bytes"] for r in self.reports if r["peak_bytes"]]
        return max(peaks) / 2**30 if peaks else None


def main(arguments: Sequence[str] | None = None, run: Runner | None = None) -> int:
    """Measure and write; the exit status is 1 where ours did not run."""
    args = parser().parse_args(arguments)
    methods = measure(args, run or subprocess_run)
    found = document(args, methods)
    write(found, methods, args.out)
    for row in found["rows"]:
        print(*(f"{name} {value}" for name, value in row.items() if value is not None), sep=", ")
    if methods[OURS].missing:
        print(f"ringfa3 FAILED: {methods[OURS].missing}", file=sys.stderr)
    return int(methods[OURS].missing is not None)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nproc", type=int, default=2, help="ranks, all of which share a sequence (2)")
    options.add_argument("--seqlen", type=parse_size, default=128 << 10, help="tokens (128K)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(PEERS)}; all")
    options.add_argument("--rounds", type=int, default=2, help="runs of each method (2)")
    options.add_argument("--limit", type=float, default=240.0, help="seconds that a run may take (240)")
    options.add_argument("--out", type=Path, default=Path("docs/results"), help="gets training.json, .md and .png")
    for name, value in MODEL.items():
        options.add_argument(f"--{name}", type=type(value), default=value, help=f"as train_long.py's ({value})")
    return options


def measure(args: argparse.Namespace, run: Runner) -> dict[str, Method]:
    """All methods, by turns; one that fails is not run again."""
    methods = {name: Method() for name in (OURS, *filter(None, args.peers.split(",")))}
    for number in range(args.rounds):
        order = list(methods) if number % 2 == 0 else list(methods)[::-1]
        for name in order:
            method = methods[name]
            if method.missing is None:
                with tempfile.TemporaryDirectory(prefix="ringfa3-training-") as folder:
                    one_run(args, name, Path(folder), method, run)
    return methods


def one_run(args: argparse.Namespace, name: str, folder: Path, method: Method, run: Runner) -> None:
    """Train once; what came of it goes to the method."""
    command = [str(ROOT / "launch/torchrun.sh"), "--nproc", str(args.nproc), str(ROOT / "examples/train_long.py")]
    command += ["--device", args.device, "--seqlen", str(args.seqlen), "--document", "0", "--save-every", "0"]
    command += [word for option in MODEL for word in (f"--{option}", str(getattr(args, option.replace("-", "_"))))]
    command += ["--checkpointing", "--out", str(folder), "--report", str(folder / "report.json")]
    status, output = run(command + (["--peer", name] if name != OURS else []), args.limit)
    if status == 0:
        method.reports.append(json.loads((folder / "report.json").read_text()))
        method.losses = [json.loads(line)["loss"] for line in (folder / "curve.jsonl").read_text().splitlines()]
        return
    lines = [line.strip() for line in output.splitlines() if "train_long.py: " in line or "Error: " in line]
    method.missing = lines[0] if lines else f"exit status {status}: {output[-200:].strip()}"
    method.reports.clear()


def subprocess_run(command: Sequence[str], limit: float) -> tuple[int, str]:
    """The exit status and all output of a command; status 124 where it took too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return 124, f"longer than {limit:g} s"
    return done.returncode, done.stdout + done.stderr


def document(args: argparse.Namespace, methods: dict[str, Method]) -> dict[str, Any]:
    """What training.json holds, in the format of docs/results; a ratio above 1 means that ours is better."""
    dtype = "fp32" if args.device == "cpu" else "bf16"
    D = args.hidden // args.heads
    case = (
        f"train causal D{D} H{args.heads}:{args.kv_heads} S{format_size(args.seqlen)} W{args.nproc} {dtype} "
        f"hidden{args.hidden} layers{args.layers}"
    )
    ours, rows = methods[OURS], []
    for name, method in methods.items():
        if name == OURS and len(methods) > 1:
            continue
        peer = "none" if name == OURS else f"{name} (missing: {method.missing})" if method.missing else name
        theirs = method if name != OURS else Method()
        for metric, mine, other in (("tokens/s", ours.speed(), theirs.speed()), ("GiB", ours.gib(), theirs.gib())):
            if mine is None:
                continue
            better = None if other is None else mine / other if metric == "tokens/s" else other / mine
            spread = ours.spread() if metric == "tokens/s" else 0.0
            values = {"ours": mine, "spread": spread, "peer": peer, "theirs": other, "ratio": better}
            rows.append({"case": case, "metric": metric} | {key: _rounded(x) for key, x in values.items()})
    return {
        "command": shlex.join(["python", "launch/bench/training.py", *_given(args)]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": machine.device_name(args.device, args.nproc),
        "versions": machine.version_table(),
        "rows": rows,
    }


def write(found: dict[str, Any], methods: dict[str, Method], folder: Path) -> None:
    """training.json, training.md and training.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    columns = ("case", "metric", "ours", "spread", "peer", "theirs", "ratio")
    grid = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in found["rows"])]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        "# Training a Llama on long sequences",
        f"{found['device']}, {found['date']}, commit {found['commit']}; {versions}.",
        f"    {found['command']}",
        "\n".join("| " + " | ".join("-" if x is None else str(x) for x in line) + " |" for line in grid),
        "tokens/s on all ranks together, the median of runs, steps after the first two; GiB is a rank's peak. A ratio "
        "above 1 means that ours is better. Each run is a process group of its own; FSDP2, activation checkpointing, "
        "the same model, data and loss (examples/train_long.py).",
        "![loss and speed](training.png)",
    ]
    (folder / "training.md").write_text("\n\n".join(parts) + "\n")
    draw(methods, folder / "training.png", str(found["device"]))


def draw(methods: dict[str, Method], path: Path, device: str) -> None:
    """Losses over steps, and a bar of tokens/s for each method."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    ran = {name: method for name, method in methods.items() if method.reports}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, method in ran.items():
        left.plot(range(1, len(method.losses) + 1), method.losses, label=name)
    left.set(xlabel="step", ylabel="loss, nats a byte", title="the same curve")
    if ran:
        left.legend()
    right.bar(list(ran), [method.speed() or 0.0 for method in ran.values()])
    right.set(ylabel="tokens/s", title=device)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _given(args: argparse.Namespace) -> list[str]:
    """The options that were not left alone, as words."""
    defaults = vars(parser().parse_args([]))
    changed = {name: value for name, value in vars(args).items() if value != defaults[name]}
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _rounded(x: Any) -> Any:
    return float(f"{x:.4g}") if isinstance(x, float) else x


if __name__ == "__main__":
    sys.exit(main())
