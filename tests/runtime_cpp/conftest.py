from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def configure(build: Path, *definitions: str) -> None:
    """CMake for the runtime alone; skips where a tool or a library is not installed."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    options = [f"-D{one}" for one in ("TOPROVAR_BUILD_PLUGINS=OFF", "CMAKE_BUILD_TYPE=Debug", *definitions)]
    options += ["-G", "Ninja"] if shutil.which("ninja") else []
    environment = {key: value for key, value in os.environ.items() if key != "TENSORRT_ROOT"}
    command = ["cmake", "-S", str(REPOSITORY), "-B", str(build), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for missing in ("CUDA's headers were not found", "the C++ runtime needs nlohmann-json"):
        if missing in done.stderr:
            pytest.skip(" ".join(done.stderr.split(missing)[1].split()) or missing)
    assert done.returncode == 0, done.stderr


def build(folder: Path, target: str) -> None:
    command = ["cmake", "--build", str(folder), "--target", target, "--parallel", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the test programs, built with address and undefined-behaviour sanitizers."""
    folder = tmp_path_factory.mktemp("runtime_cpp")
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=all -O0"
    configure(folder, "TOPROVAR_TENSORRT_INCLUDE=", f"CMAKE_CXX_FLAGS={sanitize}")
    build(folder, "toprovar_runtime_tests")
    return folder / "src" / "toprovar" / "runtime" / "cpp"
