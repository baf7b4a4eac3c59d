"""Figures of this machine, read from what `ringfa3 doctor --json` and `ringfa3 bench attention --json` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.case import Case, parse_size

if TYPE_CHECKING:
    from ringfa3.cost import Machine


def apply(machine: Machine, path: Path, dtype: str) -> Machine:
    """The machine with what the file says in place of its own figures.

    Args:
        path: doctor's JSON: the slowest pair's copies become the bandwidth of pull. A benchmark's: the speeds of ours
            on one GPU in this dtype become the kernels'.

    Raises:
        ValueError: the file cannot be read, or says nothing of the kind.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--measured: wanted a JSON file, got {path}: {error}") from None
    if isinstance(found, dict) and "findings" in found:
        return _links(machine, found, path)
    if isinstance(found, dict) and "rows" in found:
        return _kernels(machine, found, path, dtype)
    raise ValueError(f"--measured: wanted what `ringfa3 doctor --json` or a benchmark wrote, got {path}")


def _links(machine: Machine, found: dict[str, Any], path: Path) -> Machine:
    copies = found["findings"].get("links", {}).get("copy GB/s", {}).get("value")
    speeds = [cell for row in copies or () for cell in row if cell]
    if not speeds:
        raise ValueError(
            f"--measured: wanted the bandwidth of copies, which doctor measures where there are 2 GPUs or more "
            f"(without --quick), got none in {path}"
        )
    return machine.with_bandwidth("pull", float(min(speeds)), f"{path.name}: copies, the slowest pair of GPUs")


def _kernels(machine: Machine, found: dict[str, Any], path: Path, dtype: str) -> Machine:
    rates: dict[tuple[str, str], tuple[Case, float]] = {}  # (direction, the rest of the case's name) -> TFLOP/s
    for row in found["rows"]:
        tokens = row["case"].split()
        if row["metric"] == "TFLOP/s" and row["ours"] and tokens[-2:] == ["W1", dtype] and len(tokens) == 7:
            case = _case(tokens)
            if case is not None:
                rates[tokens[0], " ".join(tokens[1:])] = case, row["ours"]
    forward = {shape: (case.flops, rate, case.D) for (way, shape), (case, rate) in rates.items() if way == "fwd"}
    if not forward:
        raise ValueError(f"--measured: wanted ringfa3's TFLOP/s on one GPU in {dtype} (worlds 1), got none in {path}")
    dims = {D for _, _, D in forward.values()}
    if len(dims) > 1:
        raise ValueError(f"--measured: wanted one head_dim, got {sorted(dims)} in {path}")
    backward = {}
    for (way, shape), (case, rate) in rates.items():
        if way == "fwd+bwd" and shape in forward:
            operations, alone, _ = forward[shape]
            seconds = case.flops / rate - operations / alone
            backward[shape] = 2.5 * operations, 2.5 * operations / seconds
    source = f"{path.name}: {found.get('device', 'unknown device')}, one GPU"
    return machine.with_kernels(
        source,
        forward=_by_size((operations, rate) for operations, rate, _ in forward.values()),
        backward=_by_size(backward.values()) or None,
        dtype=dtype,
        D=dims.pop(),
    )


def _by_size(points: Any) -> tuple[tuple[float, float], ...]:
    """Ascending, one rate for each number of operations."""
    return tuple(sorted(dict(points).items()))


def _case(tokens: list[str]) -> Case | None:
    """A benchmark's case from its name; None for masks that a name does not tell in full."""
    direction, mask, D, heads, size, _, dtype = tokens
    if mask not in ("causal", "full"):
        return None
    Hq, Hkv = map(int, heads.removeprefix("H").split(":"))
    return Case(direction, mask, int(D.removeprefix("D")), Hq, Hkv, parse_size(size.removeprefix("S")), 1, dtype)
