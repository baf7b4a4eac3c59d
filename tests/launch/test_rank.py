"""RankInfo: read from torchrun's and Slurm's environments, and nonsense refused by name."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest

from ringfa3_launch import RankInfo, launched
from ringfa3_launch.rank import PATIENT_ENVIRONMENT, SAFE_ENVIRONMENT, first_host, init, pick_device

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[007-009,012],cpu1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
}


def test_torchrun() -> None:
    info = RankInfo.from_env(TORCHRUN)
    assert info == RankInfo(5, 8, 1, 4, "node1", 29400)
    assert info.rendezvous == "tcp://node1:29400"


def test_torchrun_wins_over_slurm() -> None:
    assert RankInfo.from_env(SLURM | TORCHRUN).world == 8


def test_slurm() -> None:
    info = RankInfo.from_env(SLURM)
    assert info == RankInfo(5, 7, 1, 2, "gpu007", 20000 + 123456 % 20000)


def test_slurm_address_and_port_can_be_given() -> None:
    info = RankInfo.from_env(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (info.master_addr, info.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[7-9]", "gpu7"),
        ("gpu[01,03-05]-ib", "gpu01-ib"),
        ("n[3],m[1-2]", "n3"),
        ("host-12.site.org", "host-12.site.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "RANK: wanted 0..7, got 8"),
        ({"RANK": "-1"}, "RANK: wanted 0..7, got -1"),
        ({"RANK": "one"}, "RANK: wanted an integer, got 'one'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: wanted 1 or more, got 0"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK: wanted 0..3, got 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE: wanted 1..8, got 9"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: wanted 1..65535, got 99999"),
        ({"MASTER_ADDR": "a b"}, "MASTER_ADDR: wanted a host name or address, got 'a b'"),
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "LOCAL_RANK, MASTER_PORT: wanted all of torchrun's variables"),
    ],
)
def test_torchrun_nonsense(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RankInfo.from_env(TORCHRUN | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "7"}, "SLURM_PROCID: wanted 0..6, got 7"),
        ({"SLURM_NODEID": "4"}, "SLURM_NODEID: wanted 0..3, got 4"),
        ({"SLURM_NODEID": "3"}, "SLURM_LOCALID: wanted 0..0, got 1"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2x3"}, "SLURM_STEP_TASKS_PER_NODE: wanted counts such as 2(x3),1, got '2x3'"),
        ({"SLURM_STEP_NODELIST": "[1-2]"}, "SLURM_STEP_NODELIST: wanted a node list such as gpu[01-04], got '[1-2]'"),
        ({"SLURM_NTASKS": ""}, "SLURM_NTASKS: wanted all of srun's variables"),
    ],
)
def test_slurm_nonsense(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RankInfo.from_env(SLURM | change)


def test_no_launcher() -> None:
    with pytest.raises(ValueError, match=r"environment: wanted torchrun's RANK or srun's SLURM_PROCID, got neither"):
        RankInfo.from_env({"PATH": "/bin"})


def test_launched() -> None:
    assert launched(TORCHRUN)
    assert launched(SLURM)
    assert not launched({"PATH": "/bin"})
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert not launched(batch), "a batch script has a SLURM_PROCID too, but is no rank"


def test_fields_are_checked_and_frozen() -> None:
    with pytest.raises(ValueError, match=r"^rank: wanted 0\.\.1, got 2$"):
        RankInfo(2, 2, 0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RankInfo(0, 1, 0, 1).rank = 1  # type: ignore[misc]


def test_rendezvous() -> None:
    assert RankInfo(0, 1, 0, 1, "fe80::1", 80).rendezvous == "tcp://[fe80::1]:80"
    assert RankInfo(0, 1, 0, 1, file="/tmp/meet").rendezvous == "file:///tmp/meet"


def test_device_must_exist() -> None:
    with pytest.raises(ValueError, match=r"^device: wanted 'auto', 'cpu' or 'cuda', got 'tpu'$"):
        pick_device(0, 1, "tpu")
    with pytest.raises(ValueError, match=r"^device: wanted a GPU for each of 1000 ranks"):
        pick_device(0, 1000, "cuda")
    assert pick_device(3, 4, "cpu").type == "cpu"


def test_gpu_ranks_send_on_a_stream_of_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: what is handed to torch, which has no NCCL here."""
    import torch
    import torch.distributed as dist

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream

    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in SAFE_ENVIRONMENT | PATIENT_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "set, so that it is put back")
    with init(RankInfo(0, 1, 0, 1), device="cuda") as device:
        assert device == torch.device("cuda", 0)
    assert asked["backend"] == "nccl"
    assert asked["pg_options"].is_high_priority_stream
    with init(RankInfo(0, 1, 0, 1), device="cpu"):
        assert (asked["backend"], asked["pg_options"]) == ("gloo", None)
