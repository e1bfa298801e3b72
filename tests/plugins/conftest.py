from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cubin library for sm_80 and sm_90 whose index is real and whose cubins are a few bytes each: enough to compile
    and link against. Compiling the real ones takes minutes and is tested in tests/kernels."""
    pytest.importorskip("triton", reason="the index of the kernels needs triton")
    from toprovar.kernels import aot, contract, hopper, triton_kernels, tuning

    folder = tmp_path_factory.mktemp("cubins")
    entries = []
    for variant in aot.variants((80, 90)):
        parameters = []
        for name in getattr(triton_kernels, variant.kernel).arg_names:
            if name in variant.pointers:
                parameters.append({"name": name, "type": "pointer"})
            elif name not in variant.constants:
                parameters.append({"name": name, "type": "float32" if name in variant.floats else "int32"})
        parameters += [{"name": name, "type": "pointer", "hidden": True} for name in aot._HIDDEN_PARAMETERS]
        entries.append(
            {
                "name": variant.name,
                "op": variant.op,
                "kernel": variant.kernel,
                "arch": variant.arch,
                "dtype": variant.dtype,
                **variant.describes,
                "symbol": variant.kernel,
                "constants": dict(variant.constants),
                "threads": 32 * variant.num_warps,
                "shared_bytes": 1024,
                "parameters": parameters,
                "grid": [{"size": size, "per_program": amount} for size, amount in variant.grid],
            }
        )
    for build in itertools.chain.from_iterable(hopper.VARIANTS.values()):
        given = "mean" if build.entropy else "none"
        described = {
            "name": f"hopper_attention_sm90_{build.dtype}_d{build.head_dim}_{build.name}_{given}",
            "op": "entropy_attention",
            "kernel": "hopper_attention",
            "arch": 90,
        }
        entries.append({**described, **build.metadata(), "entropy": given})
    for entry in entries:
        content = entry["name"].encode()
        entry |= {
            "file": f"{entry['name']}.cubin",
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        (folder / entry["file"]).write_bytes(content)
    index = {
        "format_version": aot.FORMAT_VERSION,
        "contract_version": contract.CONTRACT_VERSION,
        "kernel_revision": contract.KERNEL_REVISION,
        "archs": [80, 90],
        "tuning": aot._tables((80, 90)),
        "kernels": entries,
    }
    assert set(tuning.ARCHS) >= {80, 90}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def cmake(build: Path, *definitions: str, target: str, tensorrt: str | None = None) -> Path:
    """Configure and build one target; returns the build folder."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TENSORRT_ROOT"}
    options = [f"-D{one}" for one in (*definitions, f"Python3_EXECUTABLE={sys.executable}", "CMAKE_BUILD_TYPE=Debug")]
    options += [f"-DTENSORRT_ROOT={tensorrt}"] if tensorrt else []
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    configure = ["cmake", "-S", str(REPOSITORY), "-B", str(build), *options]
    done = subprocess.run(configure, capture_output=True, text=True, env=environment)
    if "CUDA's headers were not found" in done.stderr:
        pytest.skip("the headers of CUDA 12 or later are not installed")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        ["cmake", "--build", str(build), "--target", target, "--parallel", "2"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return build


@pytest.fixture(scope="session")
def core_build(cubins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin core and its test programs, with no headers of TensorRT."""
    return cmake(
        tmp_path_factory.mktemp("core"),
        f"TOPROVAR_CUBINS={cubins}",
        "TOPROVAR_BUILD_RUNTIME=OFF",
        "TOPROVAR_TENSORRT_INCLUDE=",
        target="toprovar_core_tests",
    )


def tensorrt_roots() -> list[str]:
    """TENSORRT_ROOT may name several header folders, separated as in PATH."""
    return [root for root in os.environ.get("TENSORRT_ROOT", "").split(os.pathsep) if root]
