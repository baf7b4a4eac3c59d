"""RingCluster: ranks that compute for this process, whatever started them: attention, sessions, completions.

    with RingCluster.local(2) as cluster:
        out = cluster.attention(q, k, v)  # [B, S, H, D], numpy or torch

Ranks are watched. When one fails, whoever waits for the ranks hears `RankFailed` with the rank, its host and the cause,
and all ranks are killed and started anew; until they serve again, calls raise `NotReady`.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ringfa3 import Mask
from ringfa3.layout import deal, resolve
from ringfa3_launch.cluster.arrays import Kind, finite, take
from ringfa3_launch.cluster.completion import Completion, cancel
from ringfa3_launch.cluster.faults import Closed, NotReady
from ringfa3_launch.cluster.gang import RankHealth
from ringfa3_launch.cluster.launcher import Launcher
from ringfa3_launch.cluster.session import Session, options
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.supervise import Supervisor
from ringfa3_launch.cluster.tensors import Array

__all__ = ["Completion", "RankHealth", "RingCluster", "Session", "Settings"]


class RingCluster:
    """A gang of ranks, kept running. `local`, `torchrun` and `ray` make one; any thread may call it.

    Args:
        launcher: starts the ranks.
        settings: what they are to be; its token is replaced where it is empty.
        names: of the model, for people; None: its folder's name.

    Raises:
        Exception: why the ranks could not be started.
    """

    def __init__(self, launcher: Launcher, settings: Settings, *, name: str | None = None) -> None:
        if not settings.token:
            settings = _with_token(settings)
        if settings.tp > 1 and (settings.model is None or launcher.world % settings.tp):
            wanted = f"1 without a model, else a divisor of {launcher.world} ranks"
            raise ValueError(f"tp: wanted {wanted}, got {settings.tp}")
        self.settings, self.world = settings, launcher.world
        self.model_name = name or (Path(settings.model).name if settings.model else None)
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        self._supervisor = Supervisor(launcher, settings)
        try:
            self._supervisor.wait(None)
        except BaseException:
            self._supervisor.close()
            raise

    @classmethod
    def local(cls, n: int, *, device: str = "auto", model: str | Path | None = None, **options: Any) -> RingCluster:
        """n ranks of this machine, each a process of its own.

        Args:
            n: number of ranks.
            device: "cpu", "cuda" or "auto": GPUs where the machine has some.
            model: folder or GGUF file of a language model, for `complete`.
            options: further fields of `Settings`.

        Raises:
            ValueError: an argument is wrong.
            ChildProcessError, RankFailed, TimeoutError: the ranks could not be started.
        """
        from ringfa3_launch.cluster.local_launcher import LocalLauncher

        settings = Settings(device=device, model=_found(model), **options)
        return cls(LocalLauncher(n, device=device), settings)

    @classmethod
    def torchrun(cls, *, device: str = "auto", model: str | Path | None = None, **options: Any) -> RingCluster | None:
        """The ranks of a torchrun job, each of which calls this.

        Returns:
            On rank 0 the cluster. On all others None, when that has been closed: they serve inside this call.

        Raises:
            ValueError: torchrun did not start this process, or an argument is wrong.
        """
        from ringfa3_launch.cluster.torchrun import TorchrunLauncher

        launcher = TorchrunLauncher.join(device=device)
        if launcher is None:
            return None
        return cls(launcher, Settings(device=device, model=_found(model), **options))

    @classmethod
    def ray(
        cls,
        n: int,
        *,
        address: str | None = None,
        cpus: float = 1.0,
        name: str | None = None,
        device: str = "auto",
        model: str | Path | None = None,
        **options: Any,
    ) -> RingCluster:
        """n ranks as Ray actors, on the Ray cluster that is running or on one started for them.

        Args:
            n: number of ranks.
            address, cpus, name: see `ringfa3_launch.cluster.ray_gang.RayLauncher`.
            device: "cpu", "cuda" or "auto": GPUs where the Ray cluster has some.
            model: as in `local`; every node has it at this path.
            options: further fields of `Settings`.

        Raises:
            ValueError: an argument is wrong.
            ChildProcessError, RankFailed, TimeoutError: the ranks could not be started.
        """
        from ringfa3_launch.cluster.ray_gang import RayLauncher

        settings = Settings(device=device, model=_named(model), **options)
        return cls(RayLauncher(n, address=address, cpus=cpus, name=name), settings)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Exact attention, computed by all ranks; see `ringfa3.ring_attention`.

        Args:
            q: [B, S, Hq, D] float64, float32, float16 or bfloat16, numpy or torch.
            k, v: [B, S, Hkv, D], of q's kind and dtype; Hq a multiple of Hkv.
            causal, window, softcap, scale: as `ring_attention`'s.
            return_lse: also return the log-sum-exp of every row.
            timeout: seconds for all of it; None: no limit.

        Returns:
            out [B, S, Hq, D] in q's kind and dtype; or (out, lse fp32 [B, Hq, S]).

        Raises:
            ValueError: an argument is wrong; names it.
            RankFailed: a rank failed meanwhile. Try again.
            NotReady, Overloaded: the ranks are being restarted, or hold too much. Try again later.
            TimeoutError: not in time.
        """
        kind = Kind.of(q=q, k=k, v=v)
        header = {"do": "attention", **options(causal, window, softcap, scale), "lse": return_lse}
        Mask(causal=causal, window=window)  # what is wrong with it is said here
        B, S, Hq, D = q.shape
        if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (B, S, D):
            raise ValueError(f"k, v: wanted [{B}, {S}, Hkv, {D}], got {list(k.shape)} and {list(v.shape)}")
        if min(q.shape) < 1 or k.shape[2] < 1 or Hq % k.shape[2]:
            raise ValueError(f"q: wanted a multiple of k's {k.shape[2]} heads and no size 0, got {list(q.shape)}")
        for name, x in (("q", q), ("k", k), ("v", v)):
            finite(name, x)
        runs = deal(resolve("zigzag"), S, self.world).runs
        tensors = [{"q": take(q, hand), "k": take(k, hand), "v": take(v, hand)} for hand in runs]
        answers = self._supervisor.gang().call({**header, "seqlen": S}, tensors, timeout=timeout)
        out = kind.back([answer.tensors["out"] for answer in answers], runs, 1)
        return (out, kind.back([answer.tensors["lse"] for answer in answers], runs, 2)) if return_lse else out

    def session(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        max_tokens: int = 65536,
        timeout: float | None = None,
    ) -> Session:
        """Open a session: keys and values that stay on the ranks, sharded by position.

        Args:
            heads, kv_heads, head_dim: of its queries, keys and values; heads a multiple of kv_heads.
            dtype: "float64", "float32", "float16" or "bfloat16".
            max_tokens: for so many there is room from the start. It holds for appends in large pieces; many small ones
                of odd sizes can fill one rank a little before the others (`Overloaded`).
            timeout: seconds for each of its calls; None: no limit.

        Raises:
            ValueError: an argument is wrong; names it.
            NotReady, Overloaded: the ranks are being restarted, or have no memory for it. Try again later.
        """
        return Session(
            self._supervisor.gang(), heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
            max_tokens=max_tokens, timeout=timeout,
        )  # fmt: skip

    def complete(self, prompt: str | Sequence[int], sampling: Any = None, *, session: str | None = None) -> Completion:
        """What the model writes after a prompt, as an iterator of `ringfa3.inference` Events; the last has `finish`.

        Args:
            prompt: text, or token ids.
            sampling: a `ringfa3.inference` Sampling; None: greedy.
            session: name of a conversation, whose keys and values stay: a next prompt that begins with it reuses them.

        Returns:
            A `Completion`: an iterator with `cancel()`; leaving its `with` block, or dropping it, cancels, too.

        Raises:
            ValueError: an argument is wrong, or can never fit.
            Overloaded: too many wait. Try again later.
            NotReady: the ranks are being restarted.
        """
        if self.settings.model is None:
            raise ValueError("model: wanted a cluster with a model, got one without")
        return Completion(self._supervisor.gang(), prompt, sampling, session=session)

    def cancel(self, request: int) -> None:
        """End a completion at the next step; its last event has finish "cancelled". One that is over: nothing happens.

        Args:
            request: its number, as its events have it.
        """
        with contextlib.suppress(NotReady, Closed):
            cancel(self._supervisor.gang(), request)

    def close_session(self, name: str) -> None:
        """Forget a conversation of `complete`, once the requests that it was given have ended."""
        with contextlib.suppress(NotReady, Closed):
            self._supervisor.gang().tell(0, {"do": "close_session", "session": name})

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, in this process; None without a model, or where that has none."""
        if self.settings.model is None:
            return None
        with self._tokenizer_lock:
            if self._tokenizer is None:
                from ringfa3.inference.model import load_tokenizer

                self._tokenizer = load_tokenizer(self.settings.model)
            return self._tokenizer

    def health(self) -> list[RankHealth]:
        """How each rank is. While there is no gang: not alive, "starting"."""
        try:
            return self._supervisor.gang().health()
        except (NotReady, Closed):
            return [RankHealth(rank) for rank in range(self.world)]

    def ready(self) -> bool:
        """Whether calls would be served: all ranks answer, and have met a moment ago."""
        try:
            return self._supervisor.gang().ready()
        except (NotReady, Closed):
            return False

    def wait(self, timeout: float | None = None) -> None:
        """Until there is a gang that serves.

        Raises:
            NotReady: not within so many seconds.
            Closed: the cluster has been closed.
        """
        self._supervisor.wait(timeout)

    def info(self) -> dict[str, Any]:
        """What the ranks are: world, device, model and what the engine says about itself."""
        health = self.health()
        found: dict[str, Any] = {
            "world": self.world,
            "device": health[0].device,
            "hosts": [each.host for each in health],
            "model": self.model_name,
            "restarts": self.restarts,
        }
        try:
            gang, timeout = self._supervisor.gang(), self.settings.timeout
            engine: Mapping[str, Any] = gang.ask(0, {"do": "info"}, timeout=timeout)
            if self.settings.model is not None:
                found["last_prefill"] = _together(
                    [gang.ask(r, {"do": "hops"}, timeout=timeout) for r in range(self.world)]
                )
        except (NotReady, Closed):
            engine = {}
        return found | {name: value for name, value in engine.items() if name != "id"}

    @property
    def restarts(self) -> int:
        """How often all ranks were started anew."""
        return self._supervisor.restarts

    def close(self) -> None:
        """End all ranks. Whoever still waits hears `Closed`. Again: does nothing."""
        self._supervisor.close()

    def __enter__(self) -> RingCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _together(ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the ranks tell of the last prefill that all of them know: its number, tokens, and every rank's hops."""
    numbers = {each["number"] for each in ranks}
    if len(numbers) != 1 or not any(each["hops"] for each in ranks):  # one is ahead, or nothing was passed around
        return None
    hops = [{"rank": rank, "hops": each["hops"]} for rank, each in enumerate(ranks)]
    return {"number": ranks[0]["number"], "tokens": ranks[0]["tokens"], "ranks": hops}


def _with_token(settings: Settings) -> Settings:
    import dataclasses

    return dataclasses.replace(settings, token=secrets.token_hex(32))


def _named(model: str | Path | None) -> str | None:
    return None if model is None else str(model)


def _found(model: str | Path | None) -> str | None:
    """The model's path, absolute: ranks may have another working directory."""
    if model is None:
        return None
    if not Path(model).exists():
        raise ValueError(f"model: wanted a folder or a GGUF file, got {str(model)!r}, which is not there")
    return str(Path(model).resolve())
