"""An engine in a process of its own, on a stand-in for the binding of TensorRT and for CUDA."""

from __future__ import annotations

import ctypes
import json
import os
import types

import numpy as np
import pytest

from toprovar.errors import TargetError
from toprovar.runtime import alone

PROGRAM = """#!/bin/sh
# stands for Python: -m toprovar.runtime.alone RUN.json
[ "$1 $2" = "-m toprovar.runtime.alone" ] || exit 9
cp "$3" "$(dirname "$0")/asked.json"
if grep -q broken.engine "$3"; then echo "no GPU here" >&2; exit 1; fi
echo 1.25
"""


def test_the_process_is_told_what_to_run(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setattr(alone.sys, "executable", os.fspath(program))
    shapes, values = {"x": (4, 2), "past_k": (0, 2)}, {"x": tmp_path / "0.bin"}
    assert alone.time_alone(tmp_path / "step.engine", 3, shapes, values, 30) == 1.25
    assert json.loads((tmp_path / "asked.json").read_text()) == {
        "engine": str(tmp_path / "step.engine"),
        "profile": 3,
        "inputs": {"x": [[4, 2], str(tmp_path / "0.bin")], "past_k": [[0, 2], ""]},
        "runs": 30,
    }
    with pytest.raises(TargetError, match=r"broken\.engine in a process of its own: no GPU here"):
        alone.time_alone(tmp_path / "broken.engine", 0, {}, {}, 1)


class Cuda:
    """Memory on the host; a graph is what was queued while it was captured."""

    stream = 77

    def __init__(self) -> None:
        self.arrays: list = []
        self.launches, self.captures = [0], 0

    def allocate(self, size_bytes: int) -> int:
        self.arrays.append(np.zeros(size_bytes, np.uint8))
        return self.arrays[-1].ctypes.data

    def write(self, address: int, host: int, size_bytes: int) -> None:
        ctypes.memmove(address, host, size_bytes)

    def synchronize(self) -> None: ...

    def begin_capture(self) -> None:
        self.captures += 1

    def end_capture(self):
        return lambda: None

    def elapsed(self, run, count: int) -> list[float]:
        self.launches.append(count)
        return [9.0, *[0.5] * (count - 1)]


def test_an_engine_runs_on_the_values_that_it_is_given(tmp_path, monkeypatch, capsys):
    given: dict = {"addresses": {}, "shapes": {}, "runs": 0}
    names = ("x", "past_k", "y")

    class Context:
        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            given["profile"] = (profile, stream)
            return True

        def set_input_shape(self, name: str, shape: list[int]) -> bool:
            given["shapes"][name] = shape
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            given["addresses"][name] = address
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (4, 2)

        def execute_async_v3(self, stream: int) -> bool:
            given["runs"] += 1
            return set(given["addresses"]) == set(names)

    engine = types.SimpleNamespace(
        num_io_tensors=3,
        get_tensor_name=lambda i: names[i],
        get_tensor_dtype=lambda name: types.SimpleNamespace(itemsize=2),
        create_execution_context=Context,
    )
    module = types.ModuleType("tensorrt")
    module.Logger = lambda severity: None
    module.Logger.ERROR = 1
    module.volume = lambda shape: int(np.prod(shape))
    module.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine={b"step": engine}.get)
    monkeypatch.setitem(alone.sys.modules, "tensorrt", module)
    monkeypatch.setattr("toprovar.plugins.library.load_library", lambda trt: None)
    cuda = Cuda()
    monkeypatch.setattr("toprovar.runtime.cuda.open_cuda", lambda device: cuda)
    (tmp_path / "step.engine").write_bytes(b"step")
    np.arange(16, dtype=np.uint8).tofile(tmp_path / "0.bin")
    inputs = {"x": [[4, 2], str(tmp_path / "0.bin")], "past_k": [[0, 2], ""]}
    asked = {"engine": str(tmp_path / "step.engine"), "profile": 3, "inputs": inputs, "runs": 30}
    (tmp_path / "run.json").write_text(json.dumps(asked))
    assert alone.main([str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == "0.5\n", "the median"
    assert given["profile"] == (3, 77) and given["shapes"] == {"x": [4, 2], "past_k": [0, 2]}
    assert cuda.arrays[0].tolist() == list(range(16)) and [len(array) for array in cuda.arrays] == [16, 1, 16]
    assert cuda.launches[1:] == [3, 30] and (given["runs"], cuda.captures) == (2, 1)
