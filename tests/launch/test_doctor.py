"""ringfa3 doctor: what it finds on a CPU machine, and that broken things make it fail."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ringfa3_kernels import dispatch
from ringfa3_launch import doctor, machine
from ringfa3_launch.machine import Finding, communication, numbers, triton_pair

ROOT = Path(__file__).parents[2]


def test_on_cpu(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ringfa3_launch", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert found["broken"] == []
    sections = found["findings"]
    assert list(sections) == ["versions", "devices", "communication", "kernels", "transport", "self-test"]
    assert {"python", "ringfa3", "torch", "triton", "numpy"} <= set(sections["versions"])
    assert sections["devices"]["gpus"]["value"] == 0
    assert "no NVIDIA GPU: CPU ranks over gloo" in sections["devices"]["gpus"]["detail"]
    assert sections["kernels"]["forward"]["value"] == "aten"
    assert sections["kernels"]["portable"]["value"] == "not chosen"
    assert "CUDA" in sections["kernels"]["portable"]["detail"]
    assert sections["kernels"]["ALiBi, dropout"]["value"] == "aten"
    assert sections["kernels"]["fp8"]["value"] == "aten"
    assert "e4m3fn, e5m2" in sections["kernels"]["fp8"]["detail"]
    assert sections["transport"]["auto"]["value"] == "ring"
    test = sections["self-test"]["ring"]["value"]
    assert test["world"] == 2
    assert set(test["errors"]) == {"out", "dq", "dk", "dv"}
    assert all(0 < test["errors"][name] <= test["limits"][name] < 1e-4 for name in test["errors"])


@pytest.mark.parametrize(
    ("found", "requirements", "status", "detail"),
    [
        (
            "3.6.0",
            ["filelock", "triton==3.6.0; platform == 'Linux'"],
            "plain",
            "torch pins 3.6.0: the pair found",
        ),
        ("3.7.1", ["triton (==3.7.1) ; extra"], "plain", "torch pins 3.7.1: the pair found"),
        ("3.6.0", ["triton==3.7.1"], "note", "torch pins 3.7.1, not this"),
        ("3.6.0", ["sympy"], "plain", "torch pins none"),
        ("3.5.0", ["triton==3.5.0"], "broken", "wanted 3.6 or newer"),
        (None, ["triton==3.6.0"], "note", "impl 'portable' needs it"),
    ],
)
def test_triton_pair(found: str | None, requirements: list[str], status: str, detail: str) -> None:
    finding = triton_pair(found, requirements)
    assert (finding.value, finding.status) == (found, status)
    assert detail in finding.detail


def test_numbers() -> None:
    assert numbers("2.11.0+cu130") == (2, 11, 0)
    assert numbers("3.7.1rc2") == (3, 7, 1)


def test_communication_knows_multicast() -> None:
    found = {
        f.name: f for f in communication({"NCCL_NVLS_ENABLE": "1", "NVSHMEM_DISABLE_NVLS": "1", "NCCL_DEBUG": "INFO"})
    }
    assert found["NCCL_NVLS_ENABLE"].status == "note"
    assert "may use NVLink multicast" in found["NCCL_NVLS_ENABLE"].detail
    assert found["NVSHMEM_DISABLE_NVLS"].status == "ok"
    assert found["TORCH_SYMM_MEM_DISABLE_MULTICAST"].value is None
    assert found["NCCL_DEBUG"].value == "INFO"


def test_broken_is_said_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ringfa3_launch.cli import main

    findings = [Finding("versions", "torch", None, "broken", "cannot be imported: no such file")]
    monkeypatch.setattr(machine, "versions", lambda: findings)
    assert main(["doctor"]) == 1
    assert "broken: versions torch" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["broken"] == ["versions: torch: cannot be imported: no such file"]


def test_who_serves_alibi_and_dropout_and_why_others_do_not() -> None:
    hopper = replace(doctor.typical_call("forward", "cpu"), device="cuda", capability=(9, 0), dtype=torch.bfloat16)
    finding = doctor.positional(hopper)
    if dispatch.why_not("portable", hopper) is None:  # not in Triton's interpreter
        assert (finding.value, finding.detail) == ("portable", "hopper has no ALiBi")
    else:
        assert (finding.value, finding.status) == (None, "note")
        assert "hopper: has no ALiBi" in finding.detail


def test_fp8_is_served_where_the_gpu_has_it() -> None:
    typical = doctor.typical_call("forward", "cpu")
    finding = doctor.fp8(replace(typical, device="cuda", capability=(9, 0)))
    assert (finding.value, finding.status) == ("hopper", "ok")
    assert "v in order 'keys'" in finding.detail
    old = doctor.fp8(replace(typical, device="cuda", capability=(8, 6)))
    assert (old.value, old.status) == (None, "note")
    assert old.detail == "needs a GPU of capability 8.9 or newer, got 8.6"


def test_a_wrong_ring_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "device": "cpu",
        "seconds": 0.1,
        "errors": {"out": 0.0, "dq": float("nan")},
        "limits": {"out": 1.0, "dq": 1.0},
    }
    monkeypatch.setattr(doctor, "local", lambda *args, **options: [wrong, wrong])
    finding = doctor.self_test(2, "cpu")
    assert finding.status == "broken"
    assert finding.detail.startswith("dq wrong")


def test_a_failing_ring_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise ConnectionError("gloo has no interface")

    monkeypatch.setattr(doctor, "local", fails)
    finding = doctor.self_test(2, "cpu")
    assert finding.status == "broken"
    assert "ConnectionError: gloo has no interface" in finding.detail


def test_gpus_are_shown_and_named_in_the_verdict() -> None:
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8, "multiprocessors": 132, "fp8": True}
    findings = [
        Finding("devices", "gpu 0", gpu),
        Finding("devices", "gpu 1", gpu),
        Finding("links", "copy GB/s", [[None, 371.9], [372.3, None]]),
        Finding("kernels", "forward", "portable", "ok"),
        Finding("transport", "auto", "ring", "ok"),
    ]
    [(line, style)] = doctor.verdict(findings)
    assert style == "ok"
    assert line.startswith("2 x NVIDIA H200; attend is served by portable; transport ring; self-test not run")
    assert doctor._text(findings[0]) == "NVIDIA H200, capability 9.0, 139.8 GiB, fp8"
    assert doctor._text(findings[2]).split() == ["-", "371.9", "372.3", "-"]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="--ranks: wanted 1 or more, got 0"):
        doctor.examine(ranks=0)


def test_wrong_options_are_refused_before_it_says_that_it_examines(capsys: pytest.CaptureFixture[str]) -> None:
    from ringfa3_launch.cli import main

    assert main(["doctor", "--ranks", "0"]) == 2
    assert capsys.readouterr().err == "ringfa3: --ranks: wanted 1 or more, got 0\n"
