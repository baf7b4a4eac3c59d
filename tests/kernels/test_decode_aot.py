"""Decode's kernels compile under both Tritons as their table says: spills, wide copies, programs that fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringfa3_kernels.aot import Build, build_all
from ringfa3_kernels.portable import configs
from tests.kernels.test_aot import NEXT

REGISTERS = 65536  # of a multiprocessor, in every family
Job = dict[str, Any]


def job(head_dim: int = 128, dtype: str = "bfloat16", family: str = "sm90", **more: Any) -> Job:
    return {"kernel": "decode", "head_dim": head_dim, "dtype": dtype, "family": family, **more}


# What every Triton compiles, and what the oldest compiles alone
BOTH = [job(), job(rows=32), job(page=16), job(64), job(256), job(whole=True), job(dtype="float32", family="sm80")]
REST = [
    *(job(D) for D in (16, 32)),
    *(job(D, rows=64) for D in (16, 32, 64, 128, 256)),
    *(job(D, family="sm86") for D in (16, 64, 256)),
    *(job(D, dtype="float32", family="sm80") for D in (16, 64, 256)),
    *(job(128, family="sm86", rows=rows) for rows in (4, 64)),
    job(softcap=True),
    job(page=16, rows=32),
    job(72, dtype="float16"),
    job(batch=256),
    job(far=True),
    job(kernel="combine"),
    job(kernel="combine", rows=4096, batch=128),
]


def hold(asked: Job, build: Build) -> list[str]:
    """What the build breaks of what the table promises."""
    if asked["kernel"] == "combine":
        return [f"spills {build.spills} bytes"] if build.spills else []
    D, family, dtype = asked["head_dim"], asked["family"], getattr(torch, asked["dtype"])
    config = configs.pick_decode(D, dtype, configs.CAPABILITY[family], asked.get("rows", 4))
    broken = []
    if build.spills > config.spills:
        broken.append(f"spills {build.spills} bytes, the table allows {config.spills}")
    held = config.programs * (build.shared + 1024)  # each block costs 1 KB more
    if held > configs.SHARED[family] + 1024:
        broken.append(f"{config.programs} programs take {held} bytes of shared memory")
    if config.programs * config.num_warps * 32 * build.registers > REGISTERS:
        broken.append(f"{config.programs} programs of {build.registers} registers do not fit")
    tiles = 2 * config.block_n * configs.padded(D) * dtype.itemsize  # of K and V, bytes
    if build.copies < tiles // (16 * config.num_warps * 32):
        broken.append(f"{build.copies} copies of 16 bytes a thread for tiles of {tiles} bytes")
    if (dtype == torch.float32) == bool(build.hmma + build.hgmma):
        broken.append(f"{build.hmma} HMMA and {build.hgmma} HGMMA for {dtype}")
    if build.serialised:
        broken.append(f"wgmma is serialised: {build.serialised}")
    return broken


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["oldest", "newest"])
def test_kernels_compile_as_the_table_says(triton: str) -> None:
    newest = triton == "newest"
    if newest and not NEXT.is_dir():
        pytest.fail(f"{NEXT} is missing: make .triton-next/installed")
    jobs = BOTH if newest else BOTH + REST
    module = "ringfa3_kernels.portable.decode_builds"
    broken = []
    for asked, build in zip(jobs, build_all(module, jobs, packages=NEXT if newest else None), strict=True):
        print(asked, build)
        broken += [f"{asked}: {what}" for what in hold(asked, build)]
    assert not broken, "\n".join(broken)


def test_the_check_notices_spills_and_narrow_loads() -> None:
    (build,) = build_all("ringfa3_kernels.portable.decode_builds", [job(aligned=False)])
    said = " ".join(hold(job(), build))
    assert "spills" in said
    assert "0 copies of 16 bytes" in said
