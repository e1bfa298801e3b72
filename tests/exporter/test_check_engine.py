"""Trying an engine in a process of its own, on a stand-in for the binding of TensorRT."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest

from toprovar.errors import TargetError
from toprovar.exporter import check_engine

PROGRAM = """#!/bin/sh
# stands for Python: -m toprovar.exporter.check_engine ENGINE
[ "$1 $2" = "-m toprovar.exporter.check_engine" ] || exit 9
echo "profile 0"
case $(cat "$3") in
    good) exit 0 ;;
    refused) echo "profile 1 of 2 is not taken by a context"; echo "[TRT] [E] Myelin" >&2; exit 3 ;;
    crash) echo "[TRT] [E] Myelin" >&2; kill -SEGV $$ ;;
    error) echo "toprovar.errors.TargetError: no GPU here" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def try_engine(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setattr(check_engine.sys, "executable", os.fspath(program))

    def run(content: str) -> str | None:
        return check_engine.find_fault(content.encode(), "step.engine")

    return run


def test_a_fault_is_told_from_an_error_of_the_trial(try_engine):
    assert try_engine("good") is None
    assert try_engine("refused") == "profile 1 of 2 is not taken by a context: [TRT] [E] Myelin"
    assert try_engine("crash") == "it ended a process by signal 11: profile 0: [TRT] [E] Myelin"
    with pytest.raises(TargetError, match=r"cannot try step\.engine: profile 0: .*: no GPU here"):
        try_engine("error")


class Engine:
    """Two profiles; `x` changes, `table` does not."""

    num_optimization_profiles, num_io_tensors = 2, 3

    def __init__(self, refused: int | None, shapes: list) -> None:
        self._refused, self._shapes, self._profile = refused, shapes, 0

    def create_execution_context(self) -> Engine:
        return self

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == 0
        self._profile = profile
        return profile != self._refused

    def get_tensor_name(self, index: int) -> str:
        return ("x", "table", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name == "y" else "in"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (4, 4) if name == "table" else (-1, 2)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 2), (8 + profile, 2), (64, 2)]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes.append((self._profile, name, shape))
        return True


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"good", 0, "profile 0\nprofile 1\n"),
        (b"refused", 3, "profile 0\nprofile 1\nprofile 1 of 2 is not taken by a context\n"),
        (b"broken", 3, "it cannot be loaded\n"),
    ],
)
def test_every_profile_is_taken_at_the_shapes_that_it_is_tuned_for(
    monkeypatch, tmp_path: Path, capsys, content, status, said
):
    shapes: list = []
    engines = {b"good": Engine(None, shapes), b"refused": Engine(1, shapes), b"broken": None}
    module = types.ModuleType("tensorrt")
    module.Logger = lambda severity: None
    module.Logger.ERROR = 1
    module.TensorIOMode = types.SimpleNamespace(INPUT="in")
    module.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=engines.get)
    monkeypatch.setitem(check_engine.sys.modules, "tensorrt", module)
    monkeypatch.setattr("toprovar.plugins.library.load_library", lambda trt: None)
    path = tmp_path / "step.engine"
    path.write_bytes(content)
    assert check_engine.main([str(path)]) == status
    assert capsys.readouterr().out == said
    if status == 0:
        assert shapes == [(0, "x", (8, 2)), (1, "x", (9, 2))]
