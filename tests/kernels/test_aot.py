"""The launch table and the cubin library, on a machine with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from toprovar.errors import FormatError, InputError, TargetError
from toprovar.kernels import aot, contract, loader, tuning


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and shared bytes per thread block, as the disassembler that comes with Triton reports them."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="Triton is not installed")
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    done = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in (item.split(":") for item in line.split() if item.count(":") == 1)}


def check_compiled(variant: aot.Variant, folder: Path) -> None:
    cubin, entry = aot.compile_variant(variant)
    assert cubin[:4] == b"\x7fELF"
    assert entry["shared_bytes"] <= tuning.SHARED_LIMIT_BYTES[variant.arch]
    used = resource_usage(cubin, folder)
    assert used["STACK"] <= tuning.SPILL_LIMIT_BYTES, used
    assert used["REG"] * entry["threads"] <= 65536
    assert [p["name"] for p in entry["parameters"] if p.get("hidden")] == ["global_scratch", "profile_scratch"]


NAMED = {variant.name: variant for variant in aot.variants()}


@pytest.mark.parametrize("arch", tuning.ARCHS)
def test_the_largest_attention_fits_its_architecture(arch: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    check_compiled(NAMED[f"attention_sm{arch}_bfloat16_d128_wide_mean"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    "TOPROVAR_ALL" not in os.environ, reason="compiles 396 kernels, over ten minutes: set TOPROVAR_ALL=1"
)
@pytest.mark.parametrize("arch", tuning.ARCHS)
def test_every_kernel_fits_its_architecture(arch: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    for variant in aot.variants([arch]):
        check_compiled(variant, tmp_path)


def test_table_has_every_variant_that_a_launch_can_ask_for() -> None:
    for arch in tuning.ARCHS:
        for dtype in contract.DTYPES:
            for head_dim in contract.HEAD_DIMS:
                for tile in ("wide", "narrow"):
                    assert (arch, dtype, head_dim, tile) in tuning.TILES
    for head_dim in range(8, contract.MAX_HEAD_DIM + 1, 8):
        for arch in tuning.ARCHS:
            d0, d1 = tuning.split_head_dim(arch, head_dim)
            assert d0 + d1 >= head_dim and {d0, d1} <= {0, 16, 32, 64, 128} and (d1 == 0 or d0 < head_dim)
        assert tuning.head_bucket(head_dim) >= head_dim
    assert [tuning.split_head_dim(80, d) for d in contract.HEAD_DIMS] == [(64, 0), (64, 16), (64, 32), (128, 0)]
    assert [tuning.split_head_dim(90, d) for d in contract.HEAD_DIMS] == [(64, 0), (128, 0), (128, 0), (128, 0)]


@pytest.mark.parametrize("queries", [1, 16, 100, 410, 4096])
@pytest.mark.parametrize("keys", [1, 21, 900, 10521])
def test_splits_cover_the_keys_and_none_is_empty(queries: int, keys: int) -> None:
    for row_heads in (4, 32, 224):
        config = tuning.choose(90, "bfloat16", 128, queries, keys, row_heads)
        assert (config.splits - 1) * config.keys_per_split < keys <= config.splits * config.keys_per_split
        assert config.keys_per_split % config.tile.block_n == 0
        assert config.splits == 1 or config.tile_name == "narrow"


def test_nearest_architecture() -> None:
    assert [tuning.nearest_arch(c) for c in (75, 80, 87, 89, 90, 103, 121)] == [None, 80, 86, 89, 90, 100, 120]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of three small kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path_factory.mktemp("aot") / "cubins"
    wanted = [NAMED[name] for name in ("mean_heads_sm80_h32", "select_sm80_n256", "gather_sm80_bfloat16")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "variants", lambda archs: wanted)
        aot.build_library(out, [80])
        aot.build_library(out, [80])  # a library may be replaced
    return out


def test_index_says_what_a_launcher_needs(library: Path) -> None:
    index = json.loads((library / aot.INDEX_NAME).read_text())
    assert index["contract_version"] == contract.CONTRACT_VERSION and index["archs"] == [80]
    gather = next(entry for entry in index["kernels"] if entry["op"] == "gather_tokens")
    assert gather["source"] == "triton" and gather["tensor_maps"] is False and gather["threads"] == 128
    assert [p["name"] for p in gather["parameters"]][:3] == ["x", "indices", "kept"]
    assert gather["grid"][1] == {"size": "channels", "per_program": tuning.TOKEN_BLOCK[0]}
    assert {tile["arch"] for tile in index["tuning"]["tiles"]} == {80}
    assert not list(library.parent.glob(".*"))


def test_library_is_checked_before_it_is_used(library: Path, tmp_path: Path) -> None:
    opened = loader.Library(library)
    name = opened.find(op="select_tokens", arch=80)["name"]
    assert opened.read(name)[:4] == b"\x7fELF"
    with pytest.raises(TargetError, match="no kernel with op=select_tokens, arch=90"):
        opened.find(op="select_tokens", arch=90)
    with pytest.raises(FormatError, match="cannot be read"):
        loader.Library(tmp_path)
    opened._entries[name] = opened._entries[name] | {"sha256": "0"}
    with pytest.raises(FormatError, match="build it again"):
        opened.read(name)
    opened._entries[name] = opened._entries[name] | {"file": "../index.json"}
    with pytest.raises(FormatError, match="not inside the folder"):
        opened.read(name)


def test_library_of_another_version_is_refused(library: Path, tmp_path: Path) -> None:
    index = json.loads((library / aot.INDEX_NAME).read_text())
    (tmp_path / aot.INDEX_NAME).write_text(json.dumps(index | {"contract_version": 0}))
    with pytest.raises(FormatError, match="contract_version 0"):
        loader.Library(tmp_path)


def test_only_a_library_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="no cubin library"):
        aot.build_library(tmp_path, [80])
    with pytest.raises(InputError, match="valid are 80"):
        aot.build_library(tmp_path / "new", [75])
    assert (tmp_path / "thesis.tex").exists() and not (tmp_path / "new").exists()
