"""launch/torchrun.sh and launch/slurm.sbatch, run as they stand on 2 gloo ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = str(HERE / "ranks.py")

# Slurm on one node: srun runs the command, scontrol names the node
SRUN = '#!/bin/sh\nwhile case "$1" in --*) true;; *) false;; esac; do shift; done\nexec "$@"\n'
SCONTROL = "#!/bin/sh\necho localhost\n"


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment | extra, capture_output=True, text=True, timeout=120, cwd=ROOT)

    return run


def test_torchrun_defaults_to_two_cpu_ranks(run: Run) -> None:
    done = run(["launch/torchrun.sh", SCRIPT, "a", "--b=c"])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0 of 2 sum 3 NVLS 0 args ['a', '--b=c']",
        "rank 1 of 2 sum 3 NVLS 0 args ['a', '--b=c']",
    ]


@pytest.mark.parametrize(
    ("arguments", "handed_on"),
    [
        (["--nproc", "3", "x.py", "--nproc", "9"], "--standalone --nproc-per-node=3 x.py --nproc 9"),
        (
            ["--nproc=4", "--max-restarts=0", "-m", "mod", "a"],
            "--standalone --nproc-per-node=4 --max-restarts=0 -m mod a",
        ),
        (
            ["--nproc=8", "--nnodes=2", "--rdzv-endpoint=host:1", "x.py"],
            "--nproc-per-node=8 --nnodes=2 --rdzv-endpoint=host:1 x.py",
        ),
    ],
)
def test_torchrun_hands_options_on(arguments: list[str], handed_on: str, tmp_path: Path, run: Run) -> None:
    python = tmp_path / "python"  # prints what it would have run, and as what
    python.write_text(
        '#!/bin/sh\necho "$@"; echo $NCCL_NVLS_ENABLE $TORCH_SYMM_MEM_DISABLE_MULTICAST $NVSHMEM_DISABLE_NVLS\n'
    )
    python.chmod(0o755)
    done = run(["launch/torchrun.sh", *arguments], PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"-m torch.distributed.run {handed_on}", "0 1 1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted a script, got none"),
        (["--nproc", "two", "x.py"], "--nproc: wanted a number of ranks, got two"),
        (["--nnodes", "2", "x.py"], "--nnodes: wanted --nproc N or a torchrun option written --name=value"),
    ],
)
def test_torchrun_refuses(arguments: list[str], message: str, run: Run) -> None:
    done = run(["launch/torchrun.sh", *arguments])
    assert done.returncode == 2
    assert message in done.stderr


def test_torchrun_help(run: Run) -> None:
    done = run(["launch/torchrun.sh", "--help"])
    assert done.returncode == 0
    assert "launch/torchrun.sh [--nproc N]" in done.stdout


def test_slurm(tmp_path: Path, run: Run) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "NPROC": "2",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    done = run(["bash", "launch/slurm.sbatch", SCRIPT, "x"], **slurm)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank")]
    assert sorted(lines) == [f"rank {rank} of 2 sum 3 NVLS 0 args ['x']" for rank in range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "wanted a script"), (["x.py"], "wanted a Slurm job, got none")]
)
def test_slurm_refuses(arguments: list[str], message: str, run: Run) -> None:
    done = run(["bash", "launch/slurm.sbatch", *arguments], SLURM_JOB_ID="")
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(run: Run) -> None:
    done = run(["shellcheck", "launch/torchrun.sh", "launch/slurm.sbatch"])
    assert done.returncode == 0, done.stdout
