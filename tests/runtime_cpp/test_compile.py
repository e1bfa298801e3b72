"""toprovar_run compiles without warnings against TensorRT's headers, and says what is missing on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.runtime import tiny

from .conftest import build, configure

pytestmark = [pytest.mark.cpp, pytest.mark.slow]


def test_toprovar_run_compiles_and_names_what_it_misses(tmp_path):
    roots = [root for root in os.environ.get("TENSORRT_ROOT", "").split(os.pathsep) if root]
    if not roots:
        pytest.skip("TENSORRT_ROOT is not set: no headers of TensorRT to compile against")
    bundle = tiny.write_bundle(tmp_path / "tiny.bundle")
    for i, root in enumerate(roots):
        folder = tmp_path / str(i)
        configure(folder, f"TENSORRT_ROOT={root}", "CMAKE_CXX_FLAGS=-O0")
        build(folder, "toprovar_run")
        program = folder / "src" / "toprovar" / "runtime" / "cpp" / "toprovar_run"
        assert (
            "toprovar_run BUNDLE --label NAME"
            in subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
        )
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        assert "nvinfer" not in linked and "cuda" not in linked and "python" not in linked
        if shutil.which("nvidia-smi") is None:
            done = subprocess.run([program, str(bundle), "--verify"], capture_output=True, text=True)
            assert done.returncode == 2
            assert "install the NVIDIA driver" in done.stderr and len(done.stderr.splitlines()) == 1
