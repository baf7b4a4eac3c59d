"""Ranks as Ray actors, on a real Ray cluster of this machine: right answers, dead and stopped ranks, what is left."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ringfa3 import RankFailed
from ringfa3_launch.cluster import RingCluster
from ringfa3_launch.cluster.ray_actor import Place, gpus_of, infos
from ringfa3_launch.cluster.ray_answers import gist
from ringfa3_launch.cluster.ray_gang import CONTROL, RayLauncher
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.rank import SAFE_ENVIRONMENT
from tests.kernels.oracle import assert_close
from tests.patience import patience

ROOT = Path(__file__).parents[2]
ray_installed = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
TIMEOUT = 5.0  # seconds of silence after which a rank counts as failed
PREPARE = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
config = prepare_config(yaml.safe_load(open(sys.argv[1])))
validate_config(config)
print(json.dumps(config))
"""


def until(done: Callable[[], bool], seconds: float) -> float:
    """Seconds until done(), at the latest after so many of a machine of one's own."""
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < patience(seconds), f"not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - start


def exact(cluster: RingCluster, *, seqlen: int = 257) -> None:
    """Attention of random inputs is as right as torch's own."""
    q, k, v = (torch.randn(1, seqlen, heads, 32) for heads in (4, 2, 2))
    found = cluster.attention(q, k, v, causal=True)

    def plain(*inputs: torch.Tensor) -> torch.Tensor:
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    assert_close("out", found, plain(q.double(), k.double(), v.double()), plain(q, k, v), q.dtype)


class Nodes:
    """A Ray cluster of this machine, as `ray start` makes it; each node is one of its processes."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._nodes: list[subprocess.Popen[bytes]] = []
        try:
            log = self.add(4, "--head", "--port=0", "--include-dashboard=false")
            found = re.search(r"--address='([\d.]+:\d+)'", log)
            assert found is not None, log
        except BaseException:
            self.close()
            raise
        self.address = found[1]

    def add(self, cpus: int, *options: str) -> str:
        """Start a node; returns what it says."""
        log = self._folder / f"node{len(self._nodes)}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += ["--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats", *options]
        with log.open("wb") as file:
            node = subprocess.Popen(command, env=self._environment, stdout=file, stderr=file, start_new_session=True)
        self._nodes.append(node)
        until(lambda: b"This command will now block" in log.read_bytes() or node.poll() is not None, 120)
        return log.read_text()

    def remove(self) -> None:
        """End the node that was added last."""
        node = self._nodes.pop()
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(40)
        finally:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()

    def close(self) -> None:
        while self._nodes:
            self.remove()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A Ray cluster with 4 CPUs, which RAY_ADDRESS names and whose token this process knows."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text(secrets.token_hex(32))
    path = os.pathsep.join(str(ROOT / root) for root in (".", "kernels", "launch"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        for name, value in (
            ("RAY_AUTH_MODE", "token"),
            ("RAY_AUTH_TOKEN_PATH", str(folder / "token")),
            ("RAY_enable_worker_prestart", "0"),
            ("RAY_prestart_worker_first_driver", "0"),
            ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        ):
            patch.setenv(name, value)
        nodes = Nodes(folder, os.environ | {"PYTHONPATH": path})
        try:
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            nodes.close()


@pytest.fixture(scope="module")
def launcher(nodes: Nodes) -> RayLauncher:
    return RayLauncher(2)


@pytest.fixture(scope="module")
def cluster(launcher: RayLauncher) -> Iterator[RingCluster]:
    with RingCluster(launcher, Settings(device="cpu", timeout=TIMEOUT)) as cluster:
        yield cluster


@pytest.fixture
def serving(cluster: RingCluster) -> RingCluster:
    """The cluster, with a gang that serves."""
    cluster.wait(patience(30))
    return cluster


def test_ranks_are_numbered_by_node_and_gpu() -> None:
    found = [
        Place("10.0.0.10", "b", ("0",), 1),
        Place("10.0.0.9", "a", ("10",), 2),
        Place("10.0.0.9", "a", ("9",), 3),
        Place("10.0.0.10", "b", ("GPU-f00",), 4),
        Place("node-7", "c", ("2",), 5),
    ]
    places = sorted(found, key=lambda place: place.order)
    assert [place.pid for place in places] == [5, 3, 2, 1, 4]
    assert [(i.rank, i.local_rank, i.local_world, i.world) for i in infos(places)] == [
        (0, 0, 1, 5),
        (1, 0, 2, 5),
        (2, 1, 2, 5),
        (3, 0, 2, 5),
        (4, 1, 2, 5),
    ]
    assert [gpus_of(places, rank) for rank in range(5)] == [("2",), ("9", "10"), ("9", "10")] + [("0", "GPU-f00")] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: wanted 1 rank or more, got 0"),
        ({"n": True}, "n: wanted 1 rank or more, got True"),
        ({"n": 2, "cpus": 0}, "cpus: wanted more than 0 cores a rank, got 0"),
        ({"n": 2, "address": "ray://head:10001"}, "address: wanted host:port of a Ray cluster .*, got 'ray://head"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayLauncher(**arguments)


@ray_installed
def test_ray_cluster_yaml() -> None:
    """As `ray up` reads it."""
    import yaml

    prepare = subprocess.run(
        [sys.executable, "-c", PREPARE, str(ROOT / "launch" / "ray_cluster.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert prepare.returncode == 0, prepare.stderr
    config = yaml.safe_load(prepare.stdout)
    assert config["available_node_types"]["local.cluster.node"]["max_workers"] == len(config["provider"]["worker_ips"])
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        command = config[start][-1]
        for name, value in (SAFE_ENVIRONMENT | {"RAY_AUTH_MODE": "token"}).items():
            assert f" {name}={value}" in command, start


def test_kuberay_yaml() -> None:
    """What KubeRay's schema cannot know: every Ray here asks for tokens, every rank has the safe environment."""
    yaml = pytest.importorskip("yaml")
    cluster, job, service = yaml.safe_load_all((ROOT / "launch" / "kuberay.yaml").read_text())
    assert [each["apiVersion"] for each in (cluster, job, service)] == ["ray.io/v1"] * 3
    assert [each["kind"] for each in (cluster, job, service)] == ["RayCluster", "RayJob", "RayService"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    for spec in (cluster["spec"], service["spec"]["rayClusterConfig"]):
        assert spec["authOptions"] == {"mode": "token"}
        (group,) = spec["workerGroupSpecs"]
        (worker,) = group["template"]["spec"]["containers"]
        variables = {each["name"]: each.get("value") for each in worker["env"]}
        assert SAFE_ENVIRONMENT.items() <= variables.items()
        assert worker["resources"]["limits"] == worker["resources"]["requests"]
        mounts = {each["name"] for each in worker["volumeMounts"]}
        assert mounts == {each["name"] for each in group["template"]["spec"]["volumes"]}
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert f"def {name}(" in (ROOT / "launch" / f"{module.replace('.', '/')}.py").read_text()
    script = job["spec"]["entrypoint"].split()[1]
    assert (ROOT / "examples" / Path(script).name).is_file()


def test_what_ray_says_of_a_dead_actor() -> None:
    died = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RankActor\n\tpid: 7\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) ..."
    )
    assert gist(died) == (
        "SYSTEM_ERROR (Worker unexpectedly exits with a connection error code 2): killed, out of memory, or crashed"
    )
    lost = (
        "The actor died unexpectedly before finishing this task.\n\tpid: 7\nThe actor died because its node has died."
    )
    assert gist(lost) == "The actor died because its node has died."


@ray_installed
def test_attention(serving: RingCluster) -> None:
    exact(serving)
    health = serving.health()
    assert [(each.rank, each.device, each.alive) for each in health] == [(0, "cpu", True), (1, "cpu", True)]
    assert len({each.pid for each in health} | {os.getpid()}) == 3


@ray_installed
def test_health_answers_while_a_rank_is_inside_a_collective(serving: RingCluster, launcher: RayLauncher) -> None:
    stopped = serving.health()[1].pid
    with ThreadPoolExecutor() as pool:
        call = pool.submit(exact, serving, seqlen=8192)
        until(lambda: (launcher.health(0.2)[0] or {}).get("state") == "busy", 20)
        os.kill(stopped, signal.SIGSTOP)
        try:
            start = time.monotonic()
            first, second = launcher.health(0.5)
            assert first is not None
            assert (first["state"], first["rank"]) == ("busy", 0)
            assert second is None
            assert serving.health()[0].alive
            assert time.monotonic() - start < patience(3)
            assert not call.done()
        finally:
            os.kill(stopped, signal.SIGCONT)
        call.result()


@ray_installed
@pytest.mark.parametrize(
    ("number", "cause", "seconds"),
    [(signal.SIGKILL, "SYSTEM_ERROR", 5.0), (signal.SIGSTOP, "no sign of life for 5 s", TIMEOUT + 2)],
    ids=["killed", "stopped"],
)
def test_a_rank_fails(serving: RingCluster, number: int, cause: str, seconds: float) -> None:
    before, restarts = serving.health(), serving.restarts
    q = torch.randn(1, 16384, 8, 64)
    callers = ThreadPoolExecutor(3)
    calls = [callers.submit(serving.attention, q, q, q) for _ in range(3)]
    until(lambda: serving.health()[1].state == "busy", 20)
    os.kill(before[1].pid, number)
    start = time.monotonic()
    for call in calls:
        error = call.exception(seconds - (time.monotonic() - start))
        assert isinstance(error, RankFailed)
        assert (error.rank, error.host) == (1, before[1].host)
        assert cause in str(error)
    assert error.host
    callers.shutdown()
    until(lambda: not serving.ready(), 2)
    until(lambda: not any(Path(f"/proc/{each.pid}").exists() for each in before), 5)
    serving.wait(patience(30))
    assert serving.restarts > restarts  # a loaded machine may take more than one try
    exact(serving)


@ray_installed
def test_room_on_two_nodes(nodes: Nodes, serving: RingCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other gang leaves two CPUs of the first node, so a third rank has to go to a second one."""
    monkeypatch.setattr("ringfa3_launch.cluster.ray_gang.ROOM", 1.0)
    with pytest.raises(TimeoutError, match=r"room for 3 ranks with .* each, got 2 of 4 CPU free"):
        RingCluster.ray(3, device="cpu", start_timeout=4.0)
    nodes.add(1, f"--address={nodes.address}")
    try:
        launcher = RayLauncher(3)
        with RingCluster(launcher, Settings(device="cpu")) as cluster:
            exact(cluster)
            import ray

            asked = [actor.place.options(concurrency_group=CONTROL).remote() for actor in launcher._actors]
            places = ray.get(asked, timeout=10)
            assert [place.order for place in places] == sorted(place.order for place in places)
            assert sorted(info.local_world for info in infos(places)) == [1, 2, 2]
            assert {place.pid for place in places} == {each.pid for each in cluster.health()}
        assert ray.is_initialized(), "only who joined leaves"
    finally:
        nodes.remove()
    exact(serving)


@ray_installed
def test_a_rank_that_cannot_start(serving: RingCluster) -> None:
    """Nor does the room go missing, that which a gang of that name left behind included."""
    import ray

    left = ray.util.placement_group([{"CPU": 2}], name="left")
    assert left.wait(10)
    launcher = RayLauncher(1, name="left")
    with pytest.raises(ChildProcessError, match="rank 0 ended as it started: ValueError: token: wanted 16 characters"):
        launcher.start(Settings(device="cpu", token="short"), 0)
    until(lambda: ray.available_resources().get("CPU") == 2, 10)


@ray_installed
def test_strangers_cannot_join(nodes: Nodes) -> None:
    join = f"import ray; ray.init({nodes.address!r}, log_to_driver=False)"
    environment = os.environ | {"RAY_AUTH_TOKEN": "another", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    done = subprocess.run([sys.executable, "-c", join], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "AuthenticationError" in done.stderr, done.stderr


@ray_installed
def test_example(nodes: Nodes, serving: RingCluster) -> None:
    """On the two CPUs that the other gang leaves."""
    command = [sys.executable, str(ROOT / "examples" / "ray_job.py"), "--seqlen", "1024", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "1024 tokens over 2 ranks" in done.stdout
    assert "rank 1: cpu on " in done.stdout


@ray_installed
def test_nothing_stays_behind(nodes: Nodes, cluster: RingCluster) -> None:
    """The last of those with the module's cluster: it closes it."""
    cluster.wait(patience(30))
    ranks = [each.pid for each in cluster.health()]
    cluster.close()
    import ray

    assert not ray.is_initialized()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 5)
    ray.init(nodes.address, log_to_driver=False)
    try:
        until(lambda: ray.available_resources().get("CPU") == 4, 10)
        assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
    finally:
        ray.shutdown()


LOCAL = """
import json, os, signal, sys, time
from ringfa3_launch.cluster.ray_gang import RayLauncher
from ringfa3_launch.cluster.settings import Settings

before = signal.getsignal(signal.SIGTERM)
launcher = RayLauncher(1)
(member,) = launcher.start(Settings(device="cpu", token="0123456789abcdef"), 0)
import ray

handler = signal.getsignal(signal.SIGTERM) is before
quiet = [name for name in os.environ if name.startswith("RAY_") and "prestart" in name]
if sys.argv[1] == "closed":
    launcher.close()
print(json.dumps([handler, os.environ["RAY_AUTH_MODE"], quiet, ray.is_initialized(), member.host]), flush=True)
time.sleep(600)
"""


def processes(home: Path, *, agents: bool = True) -> list[str]:
    """Command lines of the processes whose home this is; with or without Ray's agents."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line, variables = (
                    (folder / name).read_bytes().replace(b"\0", b"\n").decode(errors="replace")
                    for name in ("cmdline", "environ")
                )
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or not ours
                continue
            if f"HOME={home}\n" in variables and (agents or "Agent" not in line):
                found.append(line)
    return found


@ray_installed
@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_ray_of_its_own(tmp_path: Path, how: str, environment: dict[str, str]) -> None:
    """Without RAY_ADDRESS: started with the cluster, gone with it, or with the process that wanted it."""
    for name in [name for name in environment if name.startswith("RAY_")]:
        del environment[name]
    script = tmp_path / "one.py"
    script.write_text(LOCAL)
    environment |= {"HOME": str(tmp_path)}  # where Ray keeps the token that it makes
    with subprocess.Popen([sys.executable, str(script), how], env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            handler, mode, quiet, initialized, host = said
            assert (handler, mode, quiet, initialized, host) == (True, "token", [], how == "killed", "127.0.0.1")
            assert (tmp_path / ".ray" / "auth_token").stat().st_size
            if how == "closed":
                until(lambda: len(processes(tmp_path)) == 1, 20)  # itself
            else:
                assert len(processes(tmp_path, agents=False)) > 3
        finally:
            process.kill()
    until(lambda: not processes(tmp_path, agents=False), 20)  # Ray's agents notice after a minute that they are alone
