"""Every portable kernel compiles for sm_90, sm_80 and sm_86, under both Tritons, and keeps what its table promises."""

from pathlib import Path

import pytest
import torch

from ringfa3_kernels.aot import Build, build_all
from ringfa3_kernels.portable import configs

NEXT = Path(__file__).parents[2] / ".triton-next"  # the newest Triton; the oldest is installed

Case = tuple[str, int, str, str]  # kernel, head_dim, dtype, family

COMMON = [("bfloat16", family, D) for family in ("sm90", "sm80") for D in (64, 128)]
REST = [
    *(("bfloat16", family, D) for family in ("sm90", "sm80") for D in (16, 32, 256)),
    ("bfloat16", "sm86", 128),
    ("bfloat16", "sm86", 256),
    *(("float32", "sm80", D) for D in (16, 32, 64, 128, 256)),
]
KERNELS = ("forward", "keys", "queries")


def allowed(case: Case, softcap: bool, positional: bool = False) -> int:
    """Bytes of spills that the table admits."""
    tile = config_of(case, positional)
    return tile.softcap_spills if softcap else tile.spills


def config_of(case: Case, positional: bool = False) -> configs.TileConfig:
    kernel, head_dim, dtype, family = case
    return configs.pick(kernel, head_dim, getattr(torch, dtype), configs.CAPABILITY[family], positional)


def hold(
    case: Case, build: Build, *, softcap: bool = False, by_tma: bool = True, positional: bool = False
) -> list[str]:
    """What the build breaks of what the table promises."""
    _, _, dtype, family = case
    tile = config_of(case, positional)
    broken = []
    if build.spills > allowed(case, softcap, positional):
        broken.append(f"spills {build.spills} bytes, the table allows {allowed(case, softcap, positional)}")
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


# (case, flags): everything that is compiled, in one go: a process for each test would cost more than its kernels
JOBS: dict[str, list[tuple[Case, dict[str, bool]]]] = {
    f"{dtype}-{family}-{D}": [((kernel, D, dtype, family), {}) for kernel in KERNELS]
    for dtype, family, D in [*COMMON, *REST]
}
for _family in ("sm90", "sm80"):
    _cases: list[Case] = [(kernel, 128, "bfloat16", _family) for kernel in KERNELS]
    JOBS[f"{_family} with a softcap"] = [(case, {"softcap": True}) for case in _cases]
    JOBS[f"{_family}, nothing to continue"] = [(case, {"continues": False, "wide_out": False}) for case in _cases]
    _wide = _cases if _family == "sm90" else _cases[2:]
    _placed: list[Case] = [("forward", 64, "bfloat16", _family), *_wide]
    JOBS[f"{_family} with ALiBi and dropout"] = [(case, {"alibi": True, "dropout": True}) for case in _placed]
JOBS["padded head_dims, fp16"] = [
    (("forward", 96, "float16", "sm90"), {}),
    (("keys", 96, "float16", "sm90"), {}),
    (("queries", 72, "float16", "sm90"), {}),
]
# strides that TMA cannot read: wgmma all the same
JOBS["sm90 without TMA"] = [((kernel, 64, "bfloat16", "sm90"), {"tma": False}) for kernel in KERNELS]


# what the newest Triton compiles too: every kernel for both families, and the widest tiles
BOTH = (
    "bfloat16-sm90-64",
    "bfloat16-sm90-128",
    "bfloat16-sm90-256",
    "bfloat16-sm80-128",
    "sm90 with a softcap",
    "sm90 with ALiBi and dropout",
)


@pytest.fixture(scope="module", params=["oldest", "newest"])
def builds(request: pytest.FixtureRequest) -> dict[str, list[Build]]:
    """What became of JOBS."""
    newest = request.param == "newest"
    if newest and not NEXT.is_dir():
        pytest.fail(f"{NEXT} is missing: make .triton-next/installed")
    jobs = [(n, case, flags) for n, each in JOBS.items() if n in BOTH or not newest for case, flags in each]
    fields = ("kernel", "head_dim", "dtype", "family")
    asked = [dict(zip(fields, case, strict=True)) | flags for _, case, flags in jobs]
    made = build_all("ringfa3_kernels.portable.builds", asked, packages=NEXT if newest else None)
    found: dict[str, list[Build]] = {}
    for (name, _, _), build in zip(jobs, made, strict=True):
        found.setdefault(name, []).append(build)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_kernels_compile_as_the_table_says(builds: dict[str, list[Build]], name: str) -> None:
    if name not in builds:
        pytest.skip("the oldest Triton alone compiles these: see BOTH")
    broken = []
    for (case, flags), build in zip(JOBS[name], builds[name], strict=True):
        print(case, flags, build)
        positional = "alibi" in flags or "dropout" in flags
        broken += hold(case, build, softcap="softcap" in flags, by_tma=flags.get("tma", True), positional=positional)
    assert not broken, "\n".join(broken)


def test_the_check_notices_spills() -> None:
    """A config known to spill: the harness must see it, or every test above is blind."""
    config = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2}
    job = {"kernel": "forward", "head_dim": 128, "dtype": "bfloat16", "family": "sm80", "config": config}
    (build,) = build_all("ringfa3_kernels.portable.builds", [job])
    assert build.spills > 100
    assert hold(("forward", 128, "bfloat16", "sm80"), build)
