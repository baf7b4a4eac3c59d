"""Writes the receipt of a run on real GPUs: what passed, where, and over which sources."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def source_digest(root: Path = ROOT) -> str:
    """sha256 over the kernel and ring sources, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted((*root.glob("kernels/ringfa3_kernels/**/*.py"), *root.glob("ringfa3/**/*.py"))):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--receipt", type=Path, help="write what this run showed, and where, as JSON to this file")


class Receipt:
    """Counts outcomes and writes them down when the session ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: Counter[str] = Counter()
        self.not_passed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
            if report.outcome != "passed":
                self.not_passed.append(f"{report.outcome}: {report.nodeid}")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        self.path.write_text(
            json.dumps(
                {
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": "make test-gpu",
                    "devices": devices,
                    "versions": {
                        "python": platform.python_version(),
                        "torch": torch.__version__,
                        "triton": version("triton"),
                        "cuda": torch.version.cuda,
                    },
                    "exit_status": int(exitstatus),
                    **{name: self.outcomes[name] for name in ("passed", "failed", "skipped")},
                    "not_passed": self.not_passed,
                    "sources_sha256": source_digest(),
                },
                indent=1,
            )
            + "\n"
        )


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # with all threads each they wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    path = config.getoption("--receipt", default=None)
    if path is not None and not hasattr(config, "workerinput"):  # with pytest-xdist: not in workers
        config.pluginmanager.register(Receipt(path))
