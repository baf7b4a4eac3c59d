"""Ray as launcher: one actor a rank in one placement group; a gang starts, and dies, as one.

`RayLauncher` joins the Ray cluster that its address or RAY_ADDRESS names, or starts one on this machine, which it ends
again. All ranks go on one node where one has room for them (STRICT_PACK), else on as few as can be (PACK). They are
numbered by node and GPU. Rank 0 opens the port where the ranks meet, and keeps it (`Worker`).

Ray starts processes, says how they end, and ends them. Calls and tensors go over the cluster's own connections to the
workers (`cluster.channel`), never through Ray's object store. An actor's death ends the call that its rank runs
in, which this process hears of within tens of milliseconds. To end a gang its placement group is removed: that also
ends a process that is stopped (SIGSTOP) within a quarter of a second, where ray.kill takes five.

Ray is imported where it is used: RAY_AUTH_MODE has to be set before that, and it takes a second.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ringfa3_launch.cluster.ray_actor import RankActor, gpus_of, infos
from ringfa3_launch.cluster.ray_answers import failure, gather
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.local import cores
from ringfa3_launch.rank import SAFE_ENVIRONMENT

LOOPBACK = "127.0.0.1"
CONTROL = "control"  # concurrency group of calls that are answered while the rank is inside a collective
STORE = 80 << 20  # bytes of the object store of a Ray that is started here, near Ray's least: no tensor lies in it
ROOM = 5.0  # seconds to wait for room on one node before ranks are spread over several
END = 15.0  # seconds for a gang's processes to end
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a CPU rank is told by its settings; spares a warning
    "RAY_enable_worker_prestart": "0",  # no idle processes for tasks that nobody will send, 90 MB each
    "RAY_prestart_worker_first_driver": "0",
}


class RayMember:
    """A started rank, as the cluster sees it."""

    def __init__(self, rank: int, host: str, port: int, life: Any) -> None:
        self.rank, self.host, self.port = rank, host, port
        self._life = life  # the call of `run`: it has an outcome once the actor has ended

    def ended(self) -> str | None:
        import ray

        if not ray.is_initialized():
            return "Ray was shut down"
        ready, _ = ray.wait([self._life], timeout=0)
        return (failure(self._life) or "its main loop returned") if ready else None


class RayLauncher:
    """Gangs of n ranks on a Ray cluster; a `Launcher`.

    Args:
        n: number of ranks.
        address: of a running Ray cluster: "host:port", or "auto" for the one on this machine; "local": start one here.
            None: RAY_ADDRESS's, else the one that this process has joined, else "local".
        cpus: CPU cores that Ray is to set aside for a rank, beside its GPU.
        name: of the gang in the Ray cluster; what is there by this name is removed first. For who may be killed and
            started anew in an actor: what its placement group holds is freed with its job only.

    Raises:
        ValueError: an argument is nonsense.
    """

    def __init__(self, n: int, *, address: str | None = None, cpus: float = 1.0, name: str | None = None) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n: wanted 1 rank or more, got {n!r}")
        if not cpus > 0:
            raise ValueError(f"cpus: wanted more than 0 cores a rank, got {cpus}")
        _check_address("address", address)
        self._n, self._address, self._cpus, self._name = n, address, cpus, name or ""
        self._joined = False  # by this object, which is to leave it
        self._local = False  # started by this object, too: it ends with that
        self._group: Any = None
        self._actors: list[Any] = []  # by rank, once that is known

    @property
    def world(self) -> int:
        return self._n

    def start(self, settings: Settings, attempt: int) -> Sequence[RayMember]:
        """As `Launcher.start`.

        Raises:
            ValueError: RAY_ADDRESS, or the settings' device, is not to be had.
        """
        self.kill()
        deadline = time.monotonic() + settings.start_timeout
        self._join(settings.device)
        try:
            return self._start(settings, deadline)
        except BaseException:
            self.kill()
            raise

    def health(self, timeout: float = 1.0) -> list[dict[str, Any] | None]:
        """What each rank says of itself, by rank, through Ray alone; None: nothing within `timeout` seconds."""
        import ray

        calls = [_control(actor.health) for actor in self._actors]
        said = ray.wait(calls, num_returns=len(calls), timeout=timeout)[0] if calls else []
        return [ray.get(call) if call in said and failure(call) is None else None for call in calls]

    def kill(self) -> None:
        """As `Launcher.kill`."""
        if self._group is None:
            return
        import ray
        from ray.util import remove_placement_group

        group, actors = self._group, self._actors
        self._group, self._actors = None, []
        if not ray.is_initialized():
            return
        remove_placement_group(group)
        deadline = time.monotonic() + END
        for actor in actors:  # until it answers no more; its main loop may have returned before
            while (left := deadline - time.monotonic()) > 0:
                call = _control(actor.place)
                if ray.wait([call], timeout=left)[0] and failure(call) is not None:
                    break

    def close(self) -> None:
        """As `Launcher.close`; leaves Ray, or ends it, if this object joined or started it."""
        self.kill()
        if self._joined:
            import ray

            self._joined = self._local = False
            ray.shutdown()

    def _join(self, device: str) -> None:
        """Be part of a Ray cluster, the one that is there or one of this machine alone."""
        if "ray" not in sys.modules:  # it is read once, as Ray is imported: set later it breaks what it should protect
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray

        if ray.is_initialized():
            there = ray.get_runtime_context().gcs_address
            if not self._joined and self._address not in (None, "auto", there):
                raise ValueError(f"address: wanted {there}, which this process has joined, got {self._address}")
            return
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        _check_address("RAY_ADDRESS", address)
        self._local = address == "local"
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if self._local:
            if "RAY_AUTH_MODE" not in os.environ and tuple(map(int, ray.__version__.split(".")[:2])) < (2, 59):
                raise ValueError("RAY_AUTH_MODE: wanted it set before ray was imported (token), got nothing")
            room = max(cores(), -int(-self._n * self._cpus // 1))
            options |= {"num_cpus": room, "object_store_memory": STORE, "include_dashboard": False}
            if device == "cpu":
                options["num_gpus"] = 0
        with _process_kept(QUIET if self._local else {}):
            ray.init(**options)
        logging.getLogger("ray").setLevel(logging.WARNING)  # ERROR was for what it says of joining from a thread
        self._joined = True

    def _start(self, settings: Settings, deadline: float) -> list[RayMember]:
        import ray

        device = settings.device
        if device == "auto":
            device = "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
        gpus = int(device == "cuda")
        self._reserve({"CPU": self._cpus} | ({"GPU": 1} if gpus else {}), deadline)
        actors = [self._actor(i, gpus) for i in range(self._n)]
        places = gather([_control(actor.place) for actor in actors], "actor", deadline)
        order = sorted(range(self._n), key=lambda i: places[i].order)
        actors, places = [actors[i] for i in order], [places[i] for i in order]
        self._actors = actors
        text, here = replace(settings, device=device).to_json(), ray.get_runtime_context().get_node_id()
        alone = len({place.node for place in places}) == 1
        hosts = [LOOPBACK if alone and place.node == here else place.ip for place in places]
        ports = gather(
            [
                actor.listen.remote(info, text, host, gpus_of(places, info.rank), alone)
                for actor, info, host in zip(actors, infos(places), hosts, strict=True)
            ],
            "rank",
            deadline,
        )
        lives = [actor.run.remote() for actor in actors]
        return [
            RayMember(rank, host, port, life)
            for rank, (host, port, life) in enumerate(zip(hosts, ports, lives, strict=True))
        ]

    def _reserve(self, bundle: dict[str, float], deadline: float) -> None:
        """Have a placement group with a bundle for each rank.

        Raises:
            ValueError: this machine, the only node, has too few GPUs.
            TimeoutError: there is no room.
        """
        import ray
        from ray.util import get_placement_group, placement_group, remove_placement_group

        have = ray.cluster_resources()
        if self._local and have.get("GPU", 0) < bundle.get("GPU", 0) * self._n:
            raise ValueError(f"device: wanted a GPU for each of {self._n} ranks, got {have.get('GPU', 0):g} GPUs")
        if self._name:
            with suppress(ValueError):  # there is none
                remove_placement_group(get_placement_group(self._name))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        one = any(all(node.get(name, 0) >= self._n * need for name, need in bundle.items()) for node in nodes)
        for strategy in ("STRICT_PACK", "PACK") if one else ("PACK",):
            self._group = placement_group([bundle] * self._n, strategy=strategy, name=self._name)
            left = max(0.0, deadline - time.monotonic())
            if self._group.wait(min(ROOM, left / 2) if strategy == "STRICT_PACK" else left):
                return
            remove_placement_group(self._group)
            self._group = None
        left_over, have = ray.available_resources(), ray.cluster_resources()
        free = ", ".join(f"{left_over.get(name, 0):g} of {have.get(name, 0):g} {name} free" for name in bundle)
        raise TimeoutError(f"Ray: wanted room for {self._n} ranks with {bundle} each, got {free}")

    def _actor(self, bundle: int, gpus: int) -> Any:
        """An actor in that bundle; it dies once, and Ray neither restarts it nor repeats its calls."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        environment = dict(SAFE_ENVIRONMENT)
        if self._local:  # it can import what we can
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        made = ray.remote(
            num_cpus=self._cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={CONTROL: 2},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            runtime_env={"env_vars": environment},
        )
        return made(RankActor).remote()


def _check_address(name: str, address: str | None) -> None:
    if address is not None and "://" in address:
        raise ValueError(f"{name}: wanted host:port of a Ray cluster that this process can join, got {address!r}")


@contextmanager
def _process_kept(environment: Mapping[str, str]) -> Iterator[None]:
    """Add these variables, where they are not set, for the block alone; undo what joining Ray does to SIGTERM."""
    added = [name for name in environment if name not in os.environ]
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    os.environ.update({name: environment[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        if main:
            signal.signal(signal.SIGTERM, before)


def _control(method: Any) -> Any:
    """Call a method of an actor, without arguments, beside what it does."""
    return method.options(concurrency_group=CONTROL).remote()
