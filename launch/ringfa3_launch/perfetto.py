"""Many ranks' profiles as one Chrome/Perfetto trace, and what each rank spent its time on."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringfa3_launch.recording import CALL, CLOCK, Recording

Event = dict[str, Any]
Spans = list[tuple[float, float]]

HOP = re.compile(r"ringfa3 (forward|backward) (hop \d+ of \d+, keys of rank \d+)")
HOPS, COPIES, FIRST = 1, 2, 100  # rows of a rank: its hops, its copies (as many as overlap), its threads and streams
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
FLOWS = "stf"


@dataclass(frozen=True)
class Share:
    """What one rank spent its time on; milliseconds.

    Args:
        hops: how many it computed. total: from its first hop to its last hop or copy.
        compute, copy: in which it computed, and in which messages were under way. both: in which both were.
        gaps: of total, without compute; longest: the longest of them.
    """

    rank: int
    host: str
    hops: int
    total: float
    compute: float
    copy: float
    both: float
    gaps: float
    longest: float

    @property
    def overlap(self) -> float | None:
        """Share of the copies' time that lies within compute; None where nothing was copied."""
        return self.both / self.copy if self.copy else None


def merge(recordings: Sequence[Recording], title: str) -> dict[str, Any]:
    """One trace: process `rank` for each rank, times in microseconds from the first event on, on rank 0's clock."""
    ranks = [_Rank(recording, recordings[0].read) for recording in recordings]
    start = min(event["ts"] for rank in ranks for event in rank.events)
    events: list[Event] = []
    ids = itertools.count(1)  # flows are numbered within a process; here they share one trace
    for rank in ranks:
        flows: dict[tuple[str, Any], int] = {}
        for event in rank.events:
            event["ts"] = round(event["ts"] - start, 3)
            if event["ph"] in FLOWS:
                key = (event.get("cat", ""), event["id"])
                if key not in flows:
                    flows[key] = next(ids)
                event["id"] = flows[key]
        events += rank.titles() + rank.events
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "title": title,
            "clocks": _clocks(recordings),
            "hosts": {str(r.rank): r.host for r in recordings},
            "ahead_ns": {str(r.rank): r.ahead for r in recordings},
            "error_ns": {str(r.rank): r.error for r in recordings},
        },
        "traceEvents": events,
    }


def write(trace: dict[str, Any], path: Path) -> None:
    """Write the trace, gzipped where the name ends in .gz."""
    data = json.dumps(trace, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def shares(trace: dict[str, Any]) -> list[Share]:
    """Each rank's share of the time, from the merged trace."""
    found = []
    for rank, host in sorted((int(rank), host) for rank, host in trace["otherData"]["hosts"].items()):
        own = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == rank]
        hops = _spans(event for event in own if event["tid"] == HOPS)
        copies = union(_spans(event for event in own if COPIES <= event["tid"] < FIRST))
        kernels = _spans(e for e in own if e.get("cat") in GPU and e["tid"] >= FIRST and not e["args"].get("copy"))
        compute = union(kernels or hops)
        ends = [b for _, b in compute + copies]
        if not ends:
            found.append(Share(rank, host, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
            continue
        first, last = min(a for a, _ in compute + copies), max(ends)
        edges = [first, *(x for span in compute for x in span), last]
        gaps = [b - a for a, b in zip(edges[::2], edges[1::2], strict=True)]
        times = (last - first, _length(compute), _length(copies), _length(intersection(compute, copies)))
        total, computing, copying, both = (t / 1e3 for t in times)
        found.append(Share(rank, host, len(hops), total, computing, copying, both, sum(gaps) / 1e3, max(gaps) / 1e3))
    return found


@dataclass
class _Rank:
    """One rank's events, moved to its process and to rank 0's clock."""

    recording: Recording
    epoch: int  # ns, from which all ranks count
    events: list[Event] = field(default_factory=list)
    rows: dict[tuple[Any, Any], int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        raw: list[Event] = self.recording.profile["traceEvents"]  # type: ignore[assignment]
        marks = [event["ts"] for event in raw if event["ph"] == "X" and event["name"] == CLOCK]
        if not marks:
            raise ValueError(f"profile of rank {self.recording.rank}: wanted the range {CLOCK!r}, got none")
        # whatever the profiler counts from: at its mark the machine's clock was read. Differences first: at 1e15 us
        # a float counts in quarters of one
        mark, at = max(marks), (self.recording.read - self.recording.ahead - self.epoch) / 1e3
        calls = [event["ts"] for event in raw if event["ph"] == "X" and event["name"].startswith(CALL)]
        begin = min(calls, default=mark)
        threads = {
            (e["pid"], e["tid"]): e["args"]["name"] for e in raw if e["ph"] == "M" and e["name"] == "thread_name"
        }
        kept = [dict(event) for event in raw if self._wanted(event) and event["ts"] >= begin]
        hops = [event for event in kept if HOP.fullmatch(event["name"]) and event.get("cat") == "user_annotation"]
        launches = _launches(kept, hops)
        computing = {(e["pid"], e["tid"]) for e in kept if e.get("cat") == "kernel" and _of(e, launches) is not None}
        messages = []
        for event in kept:
            event["ts"] = event["ts"] - mark + at
            if event["name"].startswith("gloo:") and event["name"] != "gloo:barrier":
                messages.append(event)  # begins in one hop and ends in another: no place in the thread's row
                continue
            row = self._row(event["pid"], event["tid"], threads)
            if event.get("cat") in GPU and event["ph"] == "X":
                self._name_on_gpu(event, launches, computing)
                if event["args"].get("copy"):
                    messages.append(event | {"args": dict(event["args"])})
            event["pid"], event["tid"] = self.recording.rank, row
            self.events.append(event)
        self._add_hops(hops, launches, kept)
        self._add_copies(messages)

    def titles(self) -> list[Event]:
        """Names and order of the process and its rows."""
        pid, name = self.recording.rank, f"rank {self.recording.rank} ({self.recording.host})"
        found: list[Event] = [
            {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}},
            {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}},
        ]
        for tid, row in sorted(self.names.items()):
            found.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": row}})
            found.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
        return found

    def _wanted(self, event: Event) -> bool:
        """Ranges and the arrows between them; not the profiler's own bookkeeping."""
        if event["ph"] == "X":
            return event.get("cat") != "Trace" and event["name"] != CLOCK
        return event["ph"] in FLOWS

    def _row(self, pid: Any, tid: Any, threads: dict[tuple[Any, Any], str]) -> int:
        """The row for one of the profiler's threads or streams."""
        if (pid, tid) not in self.rows:
            row = self.rows[pid, tid] = FIRST + len(self.rows)
            self.names[row] = threads.get((pid, tid), f"{pid} {tid}").strip()
        return self.rows[pid, tid]

    def _name_on_gpu(self, event: Event, launches: dict[Any, Event], computing: set[tuple[Any, Any]]) -> None:
        """Say of a kernel which hop it belongs to, and whether it is a copy between ranks.

        Between GPUs the copy engine reports PtoP, or DtoD where peers' memory is mapped; on streams that compute, DtoD
        is a copy within this GPU.
        """
        args = event.setdefault("args", {})
        hop = launches.get(args.get("correlation"))
        if hop is not None:
            args["hop"] = hop["name"]
        aside = event["cat"] == "gpu_memcpy" and (event["pid"], event["tid"]) not in computing
        if "nccl" in event["name"].lower() or "PtoP" in event["name"] or (aside and "DtoD" in event["name"]):
            args["copy"] = True

    def _add_hops(self, hops: list[Event], launches: dict[Any, Event], kept: list[Event]) -> None:
        """The row of hops: where the GPU computed them, or else where the thread did."""
        on_gpu: dict[int, Spans] = {}
        for event in kept:
            if event.get("cat") == "kernel" and event["ph"] == "X" and not event["args"].get("copy"):
                hop = _of(event, launches)
                if hop is not None:
                    on_gpu.setdefault(id(hop), []).append((event["ts"], event["ts"] + event["dur"]))
        for hop in hops:
            spans = on_gpu.get(id(hop), [(hop["ts"], hop["ts"] + hop["dur"])])
            start, stop = min(a for a, _ in spans), max(b for _, b in spans)
            name = hop["name"].removeprefix("ringfa3 ")
            self._add(HOPS, "hops", name, "hop", start, stop - start, {"where": "GPU" if id(hop) in on_gpu else "CPU"})

    def _add_copies(self, messages: list[Event]) -> None:
        """Rows of copies, of one kind each: one that overlaps another goes to the next row."""
        hops = sorted((e["ts"] + e["dur"], e["name"].split(",")[0]) for e in self.events if e["tid"] == HOPS)
        rows: list[tuple[str, float]] = []  # kind, and until when it is taken
        for event in sorted(messages, key=lambda event: (event["ts"], -event["dur"])):
            kind, start, stop = _kind(event["name"]), event["ts"], event["ts"] + event["dur"]
            free = next((i for i, (own, end) in enumerate(rows) if own == kind and end <= start), len(rows))
            rows[free : free + 1] = [(kind, stop)]
            beside = next((name for end, name in hops if end > start), "nothing")  # under way, or the next to start
            args = {key: value for key, value in event.get("args", {}).items() if key in ("hop", "bytes")}
            args |= {"profiler's name": event["name"]}
            number = sum(own == kind for own, _ in rows[: free + 1])
            row = f"copies: {kind}" + (f" {number}" if number > 1 else "")
            self._add(COPIES + free, row, f"{kind}, beside {beside}", "copy", start, event["dur"], args)

    def _add(self, tid: int, row: str, name: str, cat: str, ts: float, dur: float, args: dict[str, Any]) -> None:
        self.names[tid] = row
        event = {
            "ph": "X",
            "pid": self.recording.rank,
            "tid": tid,
            "name": name,
            "cat": cat,
            "ts": ts,
            "dur": round(dur, 3),
        }
        self.events.append(event | {"args": args})


def _launches(events: list[Event], hops: list[Event]) -> dict[Any, Event]:
    """correlation -> the hop in whose range, on whose thread, the host launched it."""
    by_thread: dict[Any, list[Event]] = {}
    for hop in sorted(hops, key=lambda hop: hop["ts"]):
        by_thread.setdefault(hop["tid"], []).append(hop)
    found = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and event["ph"] == "X":
            own = by_thread.get(event["tid"], [])
            i = bisect_right(own, event["ts"], key=lambda hop: hop["ts"]) - 1
            if i >= 0 and event["ts"] <= own[i]["ts"] + own[i]["dur"]:
                found[event.get("args", {}).get("correlation")] = own[i]
    return found


def _of(event: Event, launches: dict[Any, Event]) -> Event | None:
    """The hop that a kernel belongs to."""
    return launches.get(event.get("args", {}).get("correlation"))


def union(spans: Spans) -> Spans:
    """The spans, joined where they touch, ascending."""
    joined: Spans = []
    for a, b in sorted(spans):
        if joined and a <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
        else:
            joined.append((a, b))
    return joined


def intersection(a: Spans, b: Spans) -> Spans:
    """What lies in both unions."""
    both, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            both.append((start, stop))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


def _length(spans: Spans) -> float:
    return sum(b - a for a, b in spans)


def _spans(events: Iterable[Event]) -> Spans:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def _kind(name: str) -> str:
    """What a copy is called: "send" and "receive" over gloo, "NCCL messages", "copy from a peer"."""
    if name.startswith("gloo:"):
        return {"gloo:send": "send", "gloo:recv": "receive"}.get(name, name)
    return "NCCL messages" if "nccl" in name.lower() else "copy from a peer"


def _clocks(recordings: Sequence[Recording]) -> str:
    """How the ranks' clocks were brought together, in a sentence."""
    far = [r for r in recordings if r.error]
    if not far:
        return "clocks: all ranks are on one machine and share its clock, read in a named range of each profile"
    worst = max(r.error for r in far) / 1e3
    return (
        f"clocks: {len(far)} of {len(recordings)} ranks on other machines than rank 0, compared by round trips after a "
        f"barrier, known to {worst:.0f} us"
    )
