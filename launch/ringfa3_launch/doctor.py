"""Examine this machine and the installation: what is here, which kernels and transport would run, do they work?"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from dataclasses import replace
from typing import Any

from ringfa3_launch import machine
from ringfa3_launch.console import Console
from ringfa3_launch.local import local
from ringfa3_launch.machine import Finding
from ringfa3_launch.options import gpus_for

EXAMPLES = """\
examples:
  ringfa3 doctor                  everything, about ten seconds
  ringfa3 doctor --quick          without measuring links and without starting ranks
  ringfa3 doctor --ranks 4        self-test on 4 ranks
  ringfa3 doctor --json | jq .ok  for programs: {"ok": bool, "broken": [...], "notes": [...], "findings": {...}}

exit status: 0 it works (notes may say how to do better), 1 something is broken."""

MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN", "plain": ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 doctor`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="only look: measure no links, start no ranks")
    parser.add_argument("--ranks", type=int, metavar="N", help="of the self-test (default: every GPU; 2 on CPUs)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to examine and test")


def run(args: argparse.Namespace) -> int:
    """Examine and print; 0 where nothing is broken, else 1."""
    checked(args.ranks, args.device)
    if not args.quick and not args.json:
        print("examining this machine and testing a ring of fresh ranks: some ten seconds ...", file=sys.stderr)
    findings = examine(quick=args.quick, ranks=args.ranks, device=args.device)
    broken = any(finding.status == "broken" for finding in findings)
    if args.json:
        print(json.dumps(document(findings), indent=1))
    else:
        show(findings, Console())
    return 1 if broken else 0


def examine(*, quick: bool = False, ranks: int | None = None, device: str = "auto") -> list[Finding]:
    """Everything there is to say; stops after the versions where torch cannot be imported.

    Raises:
        ValueError: ranks < 1, or device "cuda" without enough GPUs.
    """
    checked(ranks, device)
    findings = machine.versions()
    if any(finding.name == "torch" and finding.value is None for finding in findings):
        return findings
    gpus = gpus_for(device)
    findings += machine.devices()
    if not quick:
        findings += machine.links()
    findings += machine.communication()
    findings += implementations("cuda" if gpus else "cpu")
    findings += transports(world=ranks or gpus or 2, device="cuda" if gpus else "cpu")
    if not quick:
        findings.append(self_test(ranks or gpus or 2, device))
    return findings


def checked(ranks: int | None, device: str) -> None:
    """Raise ValueError, as `examine`; without torch, which is for the examination to find out, no GPU is asked for."""
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks: wanted 1 or more, got {ranks}")
    if device == "cuda":
        with contextlib.suppress(ImportError, OSError):
            gpus_for(device)


def implementations(device: str) -> list[Finding]:
    """Which implementation of attend and attend_backward `auto` chooses for a typical call, and why not the others."""
    try:
        from ringfa3_kernels import dispatch
        from ringfa3_kernels.types import Unsupported
    except Exception as error:
        return [Finding("kernels", "ringfa3_kernels", None, "broken", f"cannot be imported: {error}")]
    found = []
    for direction in ("forward", "backward"):
        call = typical_call(direction, device)
        try:
            chosen = dispatch.choose(call).NAME
        except (Unsupported, ImportError) as error:
            found.append(Finding("kernels", direction, None, "broken", str(error)))
            continue
        verb = "attend" if direction == "forward" else "attend_backward"
        size = f"{str(call.dtype).removeprefix('torch.')} H{call.Hq}:{call.Hkv} D{call.D} S{call.Sq // 1024}K"
        found.append(Finding("kernels", direction, chosen, "ok", f"{verb} is served by {chosen} ({size})"))
    for name in dispatch.IMPLEMENTATIONS:
        try:
            reason = dispatch.why_not(name, typical_call("forward", device))
        except ImportError as error:
            found.append(Finding("kernels", name, "broken", "broken", f"cannot be imported: {error}"))
            continue
        if reason is None and name not in dispatch.AUTO:
            reason = "only where it is named: its memory is quadratic"
        found.append(Finding("kernels", name, "serves" if reason is None else "not chosen", "plain", reason or ""))
    found.append(positional(typical_call("forward", device)))
    found.append(fp8(typical_call("forward", device)))
    return found


def positional(typical: Any) -> Finding:
    """Who serves ALiBi and dropout, and why others that serve the call without them do not."""
    from ringfa3_kernels import dispatch
    from ringfa3_kernels.types import Unsupported

    call = replace(typical, alibi=True, dropout=True)
    try:
        chosen = dispatch.choose(call).NAME
        others = [name for name in dispatch.AUTO if dispatch.why_not(name, typical) is None and name != chosen]
        lacking = [f"{name} {why}" for name in others if (why := dispatch.why_not(name, call)) is not None]
    except (Unsupported, ImportError) as error:
        return Finding("kernels", "ALiBi, dropout", None, "note", str(error))
    return Finding("kernels", "ALiBi, dropout", chosen, "plain", "; ".join(lacking))


def fp8(typical: Any) -> Finding:
    """Which formats there are, and who serves attention on fp8: with v as the fastest implementation wants it."""
    import torch

    from ringfa3_kernels import dispatch, quantized
    from ringfa3_kernels.types import Unsupported

    formats = ", ".join(str(x).removeprefix("torch.float8_") for x in quantized.FORMATS)
    if typical.device == "cuda" and typical.capability < quantized.CAPABILITY:
        wanted, got = (".".join(map(str, x)) for x in (quantized.CAPABILITY, typical.capability))
        return Finding("kernels", "fp8", None, "note", f"needs a GPU of capability {wanted} or newer, got {got}")
    call = replace(typical, dtype=torch.float8_e4m3fn, blocks=(quantized.BLOCK,) * 3)
    order = "keys" if dispatch.why_not("hopper", replace(call, v_order="keys")) is None else "rows"
    try:
        chosen = dispatch.choose(replace(call, v_order=order)).NAME
    except (Unsupported, ImportError) as error:
        return Finding("kernels", "fp8", None, "note", str(error))
    detail = f"quantize writes {formats}; attend on them is served by {chosen}, v in order {order!r}"
    return Finding("kernels", "fp8", chosen, "ok", detail)


def typical_call(direction: str, device: str) -> Any:
    """A 16K-token causal call with 32:8 heads of 128: bf16 on a GPU, fp32 on CPUs."""
    import torch

    from ringfa3_kernels.call import Call

    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return Call(
        direction=direction,
        device=device,
        capability=capability,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        B=1,
        Sq=16384,
        Sk=16384,
        Hq=32,
        Hkv=8,
        D=128,
        batched_visible=False,
        softcap=False,
        into=True,
        out_dtype=torch.float32,
        accumulate=True,
        deterministic=False,
        aligned=True,
    )


def transports(world: int, device: str) -> list[Finding]:
    """Which transport `auto` chooses for the typical call, and why not the other."""
    try:
        from ringfa3.transport.choose import GATHER_BYTES
    except Exception as error:
        return [Finding("transport", "auto", None, "broken", f"ringfa3.transport cannot be imported: {error}")]
    call = typical_call("forward", device)
    size = 2 * call.Sq // world * call.Hkv * call.D * call.dtype.itemsize
    limit = GATHER_BYTES
    backend = "NCCL" if device == "cuda" else "gloo"
    shard = f"{size / 2**20:.0f} MiB of keys and values a rank, {world} ranks over {backend}"
    why = f"gather is for shards below {limit >> 10} KiB, where one exchange costs less than a message a hop"
    chosen = "gather"
    if size >= limit:
        chosen = "pull" if device == "cuda" and 1 < world <= machine.mapped() else "ring"
    return [Finding("transport", "auto", chosen, "ok", f"{shard}; {why}")]


def self_test(world: int, device: str) -> Finding:
    """Ring attention, forward and backward, on fresh ranks of this machine, against the fp64 oracle."""
    started = time.perf_counter()
    try:
        from ringfa3_launch.selftest import ring_errors

        results = local(world, ring_errors, device, device=device, timeout=180)
    except Exception as error:
        trace = "\n".join(getattr(error, "__notes__", []))
        return Finding("self-test", "ring", "failed", "broken", f"{type(error).__name__}: {error}\n{trace}".rstrip())
    total = time.perf_counter() - started
    first = results[0]  # every rank has compared the whole sequence
    wrong = sorted(
        {x for result in results for x in result["errors"] if not result["errors"][x] <= result["limits"][x]}
    )
    seconds = max(result["seconds"] for result in results)
    facts = {"world": world, **first, "seconds": round(seconds, 3), "seconds_with_start": round(total, 1)}
    figures = ", ".join(f"{x} {first['errors'][x]:.1e} of {first['limits'][x]:.1e}" for x in first["errors"])
    where = f"{world} {'GPUs over NCCL' if first['device'] == 'cuda' else 'CPU ranks over gloo'}"
    detail = (
        f"forward and backward on {where} in {seconds:.2f} s, {total - seconds:.0f} s to start them\n"
        f"error against fp64, of what is allowed: {figures}"
    )
    if wrong:
        return Finding("self-test", "ring", facts, "broken", f"{', '.join(wrong)} wrong: {detail}")
    return Finding("self-test", "ring", facts, "ok", detail)


def document(findings: list[Finding]) -> dict[str, Any]:
    """What --json prints."""
    sections: dict[str, dict[str, Any]] = {}
    for finding in findings:
        entry = {"value": finding.value, "status": finding.status, "detail": finding.detail}
        sections.setdefault(finding.section, {})[finding.name] = entry
    named: dict[str, list[str]] = {"broken": [], "note": []}
    for finding in findings:
        named.get(finding.status, []).append(f"{finding.section}: {finding.name}: {finding.detail}")
    return {"ok": not named["broken"], "broken": named["broken"], "notes": named["note"], "findings": sections}


def show(findings: list[Finding], console: Console) -> None:
    """Print the findings, section by section, and the verdict."""
    sections = dict.fromkeys(finding.section for finding in findings)
    for section in sections:
        console.heading(section)
        own = [finding for finding in findings if finding.section == section]
        rows = [(finding.name, _text(finding), MARKS[finding.status], finding.detail) for finding in own]
        console.table(("", "", "", ""), rows, [finding.status for finding in own])
    console.say()
    for line, style in verdict(findings):
        console.say(line, style)


def verdict(findings: list[Finding]) -> list[tuple[str, str]]:
    """The last lines: (text, style) each."""
    broken = [finding for finding in findings if finding.status == "broken"]
    if broken:
        return [("broken: " + "; ".join(f"{finding.section} {finding.name}" for finding in broken), "broken")]
    chosen = next((finding.value for finding in findings if finding.name == "forward"), None)
    gpus = [finding for finding in findings if finding.name.startswith("gpu ")]
    transport = next((finding.value for finding in findings if finding.section == "transport"), "")
    where = f"{len(gpus)} x {gpus[0].value['name']}" if gpus else "no NVIDIA GPU: CPU ranks over gloo"
    ran = any(finding.section == "self-test" for finding in findings)
    tested = "self-test passed" if ran else "self-test not run (--quick)"
    return [(f"{where}; attend is served by {chosen}; transport {transport}; {tested}", "ok")]


def _text(finding: Finding) -> str:
    """A finding's value for people; matrices and multi-line text get lines of their own."""
    value = finding.value
    if value is None:
        return "-"
    if isinstance(value, dict):
        if finding.section == "self-test":
            return "passed" if finding.status == "ok" else "failed"
        if "fp8" in value:
            fp8 = "fp8" if value["fp8"] else "no fp8"
            return f"{value['name']}, capability {value['capability']}, {value['memory_gib']} GiB, {fp8}"
        return f"{value['cores']} cores, {value['memory_gib']} GiB"
    if isinstance(value, list):
        return "\n".join(" ".join(f"{_cell(cell):>6}" for cell in row) for row in value)
    return str(value)


def _cell(cell: Any) -> str:
    return {True: "yes", False: "no", None: "-"}.get(cell, "") or str(cell)
