"""What came of `ringfa3 bench inference` in all worlds, what is asked of it, and whether it was reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.inference_case import Load, Played, Program, Served
from ringfa3_launch.bench.verdicts import Verdict

PEER = "transformers"
K = 1 << 10
FASTER = {(2, 128 * K): 1.85}  # (ranks, prompt) -> time to the first token of one rank over that of these, at least
SHORTER = {(2, 256 * K)}  # (ranks, prompt) whose time per token has to be below that of one rank
OF_COPY = 0.85  # decode attention's bytes a second over a device copy's, at least, from 64K cached tokens on
OF_RING = 0.95  # attention's speed within a prefill over ring attention's own, at least, from 128K tokens on
MERGE = {2: 30e-6}  # ranks -> seconds that the merge of a layer may take on GPUs


@dataclass(frozen=True)
class Results:
    """Everything that was found.

    Args:
        program: what was asked.
        worlds: what came of them; the first may have been judged.
        failures: of worlds that broke off.
    """

    program: Program
    worlds: tuple[Played, ...]
    failures: tuple[str, ...]

    @property
    def title(self) -> str:
        """What all cases have in common."""
        random = ", random weights" if self.program.shape else ""
        return f"inference, {self.program.name}{random}, {self.program.dtype}, {self.program.tokens} tokens answered"

    def served(self) -> Iterator[tuple[Played, Load, Served]]:
        """Ours, by load and world."""
        for load in self.program.loads:
            for world in self.worlds:
                if load in world.served:
                    yield world, load, world.served[load]

    def alone(self, load: Load) -> Served | None:
        """Ours on one rank."""
        return next((world.served.get(load) for world in self.worlds if world.world == 1), None)

    def peer(self, load: Load) -> Served | None:
        """transformers' on one device."""
        return next((world.peer[load] for world in self.worlds if load in world.peer), None)

    def missing(self) -> list[str]:
        """What did not run, and why."""
        found = [f"{what} (world {world.world})" for world in self.worlds for what in world.missing]
        return [*found, *(f"ours FAILED on {failure}" for failure in self.failures)]


def judge(results: Results) -> list[Verdict]:
    """What is asked of these cases, and what was reached."""
    found = []
    for world, load, ours in results.served():
        alone = results.alone(load)
        on_gpu = world.device == "cuda" and results.program.shape == "llama-3-8b" and load.batch == 1
        where = f"S{format_size(load.length)} W{world.world}" + (f" B{load.batch}" if load.batch > 1 else "")
        if alone is not None and world.world > 1:
            got = alone.first.median / ours.first.median
            asked = FASTER.get((world.world, load.length)) if on_gpu else None
            found.append(_at_least(f"prefill {where}", "speed over one rank", asked, got))
            got = alone.each.median / ours.each.median
            asked = 1.0 if on_gpu and (world.world, load.length) in SHORTER else None
            found.append(_at_least(f"decode {where}", "time per token of one rank over ours", asked, got))
        checked = world.checked.get(load)
        if checked is not None:
            what = f"logits' error ({checked.by})"
            words, right = f"<= {checked.allowed:.2g}", checked.error <= checked.allowed
            found.append(Verdict(f"prefill {where}", what, "ours", words, checked.error, right))
            words = f"{PEER}' {checked.of} tokens, or a tie"
            found.append(Verdict(f"decode {where}", "equal tokens", "ours", words, checked.same, checked.tokens))
    for world in results.worlds:
        on_gpu = world.device == "cuda"
        attention = world.attention
        if attention is not None:
            judged = on_gpu and results.program.shape == "llama-3-8b" and world.world > 1
            asked = OF_RING if judged and attention.length >= 128 * K else None
            case = f"prefill S{format_size(attention.length)} W{world.world}"
            found.append(_at_least(case, "attention's speed over the ring's own", asked, attention.speed))
        for kernel in world.kernels:
            case = f"decode attention S{format_size(kernel.length)} B{kernel.batch}"
            asked = OF_COPY if on_gpu and kernel.length >= 64 * K else None
            found.append(_at_least(case, "speed over a device copy", asked, kernel.rate / kernel.copy))
        for batch, timing in world.merges.items():
            most = MERGE.get(world.world) if on_gpu else None
            words = "" if most is None else f"<= {most * 1e6:.0f} µs"
            ok = None if most is None else timing.median <= most
            case = f"merge W{world.world} B{batch}"
            found.append(Verdict(case, "µs per layer", "ours", words, timing.median * 1e6, ok))
    return found


def _at_least(case: str, what: str, asked: float | None, got: float) -> Verdict:
    if asked is None:
        return Verdict(case, what, "ours", "", got, None)
    return Verdict(case, what, "ours", f">= {asked:g}", got, got >= asked)
