"""Every portable kernel compiles for sm_90, sm_80 and sm_86 without a GPU and keeps what its table promises.

Runs under the installed Triton and, with PYTHONPATH=.triton-next, under another one.
"""

import pytest
import torch

from ringfa3_kernels.aot import Build, build_all
from ringfa3_kernels.portable import configs

Case = tuple[str, int, str, str]  # kernel, head_dim, dtype, family

COMMON = [("bfloat16", family, D) for family in ("sm90", "sm80") for D in (64, 128)]
REST = [
    *(("bfloat16", family, D) for family in ("sm90", "sm80") for D in (16, 32, 256)),
    ("bfloat16", "sm86", 128),
    ("bfloat16", "sm86", 256),
    *(("float32", "sm80", D) for D in (16, 32, 64, 128, 256)),
]
KERNELS = ("forward", "keys", "queries")


def allowed(case: Case, softcap: bool) -> int:
    """Bytes of spills that the table admits."""
    tile = config_of(case)
    return tile.softcap_spills if softcap else tile.spills


def config_of(case: Case) -> configs.TileConfig:
    kernel, head_dim, dtype, family = case
    return configs.pick(kernel, head_dim, getattr(torch, dtype), configs.CAPABILITY[family])


def hold(case: Case, build: Build, *, softcap: bool = False, by_tma: bool = True) -> list[str]:
    """What the build breaks of what the table promises."""
    _, _, dtype, family = case
    tile = config_of(case)
    broken = []
    if build.spills > allowed(case, softcap):
        broken.append(f"spills {build.spills} bytes, the table allows {allowed(case, softcap)}")
    if build.shared > configs.SHARED[family]:
        broken.append(f"takes {build.shared} bytes of shared memory, a block may have {configs.SHARED[family]}")
    if build.serialised and not tile.serialised:
        broken.append(f"wgmma is serialised: {build.serialised}")
    if dtype == "float32":
        if build.hgmma or build.hmma or not build.ffma:
            broken.append("fp32 inputs must not go through tensor cores in tf32")
    elif family == "sm90" and (not build.hgmma or build.hmma):
        broken.append(f"wanted wgmma only, got {build.hgmma} HGMMA and {build.hmma} HMMA")
    elif family != "sm90" and not build.hmma:
        broken.append("wanted HMMA, got none")
    if (tile.tma and by_tma) != bool(build.tma):
        broken.append(f"{build.tma} TMA loads")
    return [f"{case}{' softcap' if softcap else ''}: {what}" for what in broken]


def check(cases: list[Case], **flags: object) -> None:
    jobs = [dict(zip(("kernel", "head_dim", "dtype", "family"), case, strict=True)) | flags for case in cases]
    builds = build_all("ringfa3_kernels.portable.builds", jobs)
    print(*(f"{c} {flags} {b}" for c, b in zip(cases, builds, strict=True)), sep="\n")
    how = {"softcap": bool(flags.get("softcap")), "by_tma": flags.get("tma") is not False}
    broken = [what for case, build in zip(cases, builds, strict=True) for what in hold(case, build, **how)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("dtype", "family", "head_dim"), COMMON)
def test_kernels_compile_as_the_table_says(dtype: str, family: str, head_dim: int) -> None:
    check([(kernel, head_dim, dtype, family) for kernel in KERNELS])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "family", "head_dim"), REST)
def test_rarer_kernels_compile_as_the_table_says(dtype: str, family: str, head_dim: int) -> None:
    check([(kernel, head_dim, dtype, family) for kernel in KERNELS])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sm90", "sm80"])
def test_flags_compile_as_the_table_says(family: str) -> None:
    cases = [(kernel, 128, "bfloat16", family) for kernel in KERNELS]
    check(cases, softcap=True)
    check(cases, continues=False, wide_out=False)


@pytest.mark.slow
def test_padded_head_dims_and_fp16_compile() -> None:
    check([("forward", 96, "float16", "sm90"), ("keys", 96, "float16", "sm90"), ("queries", 72, "float16", "sm90")])


@pytest.mark.slow
def test_strides_that_tma_cannot_read_still_use_wgmma() -> None:
    check([(kernel, 64, "bfloat16", "sm90") for kernel in KERNELS], tma=False)


def test_the_check_notices_spills() -> None:
    """A config known to spill: the harness must see it, or every test above is blind."""
    config = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2}
    job = {"kernel": "forward", "head_dim": 128, "dtype": "bfloat16", "family": "sm80", "config": config}
    (build,) = build_all("ringfa3_kernels.portable.builds", [job])
    assert build.spills > 100
    assert hold(("forward", 128, "bfloat16", "sm80"), build)
