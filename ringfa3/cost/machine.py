"""Machine: what one kind of GPU and its links were measured to do; every figure says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

MIB = 1 << 20
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Link:
    """How long a message takes, and what it costs the attention kernel beside it.

    Args:
        points: (bytes, GB/s) as measured, ascending in bytes. Between them a message's time is interpolated, above the
            last one its bandwidth holds, below the first one the time falls to the latency.
        latency: seconds of a message of no bytes.
        stall: share of a transfer's time by which a kernel that runs beside it takes longer.
    """

    points: Points
    latency: float
    stall: float

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or min(min(point) for point in self.points) <= 0:
            raise ValueError(f"points: wanted ascending (bytes, GB/s), all positive, got {self.points}")
        if self.latency < 0 or self.stall < 0:
            raise ValueError(f"latency, stall: wanted 0 or more, got {self.latency}, {self.stall}")

    def seconds(self, size: float) -> float:
        """Of a message of so many bytes; 0 where there is none."""
        if size <= 0:
            return 0.0
        largest, rate = self.points[-1]
        if size >= largest:
            return size / (rate * 1e9)
        times = [bytes_ / (gbs * 1e9) for bytes_, gbs in self.points]
        sizes = [0.0, *(bytes_ for bytes_, _ in self.points)]
        return float(np.interp(size, sizes, [min(self.latency, times[0]), *times]))

    def scaled(self, gbs: float) -> Link:
        """This link, with that bandwidth for large messages and the others' in proportion."""
        if not gbs > 0:
            raise ValueError(f"bandwidth: wanted GB/s above 0, got {gbs}")
        factor = gbs / self.points[-1][1]
        return replace(self, points=tuple((size, rate * factor) for size, rate in self.points))


@dataclass(frozen=True)
class Machine:
    """Measured figures of GPUs and links; the defaults' sources are in `sources`.

    Args:
        name: what it is.
        forward, backward: (operations of a call, TFLOP/s) of the attention kernels alone at head_dim 128, ascending,
            interpolated in the logarithm of the operations; outside of the range the nearest holds.
        head_dims: (D, forward's speed, backward's speed) relative to D 128, ascending in D.
        pull, sendrecv: (ranks, Link): copies from a peer's memory, and NCCL messages, inside a host; of the entries the
            one for the most ranks that are not more than there are.
        between: messages between hosts, for each GPU.
        launch: seconds that a hop costs beside its kernel's work; call: that a call costs beside its hops.
        memory_bandwidth: bytes/s, read and write together. memory: bytes of a GPU.
        state: share of the fp32 state's traffic that a hop's kernel does not hide.
        multiprocessors: of a GPU; tile: query rows of a kernel's tile. A hop takes no less than its longest tile.
        dtypes: for which the rates hold.
        sources: figure -> where it was measured, or that it is assumed.
    """

    name: str
    forward: Points
    backward: Points
    head_dims: tuple[tuple[int, float, float], ...]
    pull: tuple[tuple[int, Link], ...]
    sendrecv: tuple[tuple[int, Link], ...]
    between: Link
    launch: float
    call: float
    memory_bandwidth: float
    memory: float
    state: float
    multiprocessors: int
    tile: int
    dtypes: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]

    @staticmethod
    def h200() -> Machine:
        """H200s in one NVLink host, and assumed 400 Gb/s a GPU between hosts."""
        ring, anchors = "docs/results/ring.md", "H200, torch 2.11, NCCL 2.28.9, 2026-11-22"
        return Machine(
            name="NVIDIA H200",
            forward=((2.2e12, 663.4), (35.2e12, 662.7), (563e12, 655.9)),
            backward=((5.5e12, 548.7), (88e12, 547.4), (352e12, 553.2)),
            head_dims=((64, 0.74, 0.88), (128, 1.0, 1.0), (256, 1.08, 0.79)),
            pull=(
                (2, Link(((4 * MIB, 276), (64 * MIB, 365), (256 * MIB, 372)), 5e-6, 0.48)),
                (4, Link(((4 * MIB, 242), (64 * MIB, 363), (256 * MIB, 372)), 5e-6, 0.0)),
            ),
            sendrecv=(
                (2, Link(((4 * MIB, 50), (64 * MIB, 261), (256 * MIB, 303)), 20e-6, 0.91)),
                (4, Link(((4 * MIB, 83), (64 * MIB, 155), (256 * MIB, 302)), 20e-6, 1.12)),
            ),
            between=Link(((1 * MIB, 20), (16 * MIB, 40), (256 * MIB, 45)), 30e-6, 0.9),
            launch=10e-6,
            call=30e-6,
            memory_bandwidth=4.3e12,
            memory=141e9,
            state=0.6,
            multiprocessors=132,
            tile=128,
            dtypes=("bf16", "fp16"),
            sources=(
                ("kernel, forward", f"{ring}, one GPU, hopper kernel, causal, 32:8 heads, D 128"),
                ("kernel, backward", f"{ring}, one GPU, forward+backward less forward, hopper kernel"),
                ("other head_dims", "docs/results/attend_forward.md forward; FA3's proportions backward"),
                ("pull", f"symmetric-memory copies, 2 and 4 GPUs, {anchors}"),
                ("sendrecv", f"NCCL send/recv, 2 and 4 GPUs, {anchors}"),
                ("stall beside a transfer", f"3.32 ms of attention beside 128 MiB, {anchors}"),
                ("between hosts", "assumed: 400 Gb/s a GPU at 90%; not measured"),
                ("latency, launch, call", "assumed, near what 16K tokens on 2 GPUs lack; not measured alone"),
                ("state from hop to hop", "docs/results/attend_forward.md: into= at 8K costs 2.3%"),
                ("memory bandwidth", f"device copy, {anchors}"),
            ),
        )

    def kernel_seconds(self, operations: float, D: int, *, backward: bool = False) -> float:
        """Of a kernel alone, without its launch."""
        if operations <= 0:
            return 0.0
        return operations / (self.rate(operations, D, backward=backward) * 1e12)

    def rate(self, operations: float, D: int, *, backward: bool = False) -> float:
        """TFLOP/s of a kernel that does so many operations."""
        points = self.backward if backward else self.forward
        sizes = np.log([size for size, _ in points])
        rate = np.interp(np.log(operations), sizes, [rate for _, rate in points])
        return float(rate) * self._relative(D, backward=backward)

    def link(self, kind: str, ranks: int) -> Link:
        """The link of that kind ("pull", "sendrecv" or "between") where so many ranks use it at once."""
        if kind == "between":
            return self.between
        links: tuple[tuple[int, Link], ...] = getattr(self, kind)
        return next((link for least, link in reversed(links) if least <= ranks), links[0][1])

    def with_bandwidth(self, kind: str, gbs: float, source: str) -> Machine:
        """This machine with that bandwidth for large messages of a link.

        Raises:
            ValueError: no link has that name, or the bandwidth is not positive.
        """
        if kind == "between":
            return self._sourced("between hosts", source, between=self.between.scaled(gbs))
        if kind not in ("pull", "sendrecv"):
            raise ValueError(f"bandwidth: wanted that of pull, sendrecv or between, got {kind!r}")
        links = tuple((ranks, link.scaled(gbs)) for ranks, link in getattr(self, kind))
        return self._sourced(kind, source, **{kind: links})

    def with_kernels(
        self,
        source: str,
        *,
        forward: Points | None = None,
        backward: Points | None = None,
        dtype: str | None = None,
        D: int = 128,
    ) -> Machine:
        """This machine with other rates of the kernels, (operations, TFLOP/s) at head_dim D; dtype: for that alone."""
        machine = self
        for name, points in (("forward", forward), ("backward", backward)):
            if points is not None:
                if not points or min(rate for _, rate in points) <= 0:
                    raise ValueError(f"{name}: wanted rates above 0, got {points}")
                share = self._relative(D, backward=name == "backward")
                rates = tuple((size, rate / share) for size, rate in sorted(points))
                machine = machine._sourced(f"kernel, {name}", source, **{name: rates})
        return machine if dtype is None else replace(machine, dtypes=(dtype,))

    def _relative(self, D: int, *, backward: bool) -> float:
        """Speed of the kernels at this head_dim, of that at 128."""
        dims = [dim for dim, *_ in self.head_dims]
        return float(np.interp(D, dims, [speed[2 if backward else 1] for speed in self.head_dims]))

    def _sourced(self, figure: str, source: str, **changed: object) -> Machine:
        sources = tuple((name, source if name == figure else old) for name, old in self.sources)
        return replace(self, sources=sources, **changed)  # type: ignore[arg-type]  # fields of this class
