"""`bench --trtexec` against a program that stands for trtexec: what it is asked for, and what becomes of its answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from toprovar.errors import InputError, TargetError
from toprovar.runtime import trtexec
from toprovar.runtime.session import Session
from toprovar.runtime.target import Buffer
from toprovar.runtime.tensorrt import EngineInputs

from .test_tensorrt import mock  # noqa: F401  (a fixture: TensorRT as a mock)

SHAPES = {"x": (4, 2, 8), "keep_slots": (3,), "scalar": ()}
RUN = EngineInputs("step", 2, {name: Buffer(0, 4096, "float32", shape) for name, shape in SHAPES.items()})

PROGRAM = """#!/usr/bin/env python3
import json, os, sys
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
if "--help" in sys.argv:
    print({help!r})
elif "--exportTimes" in given and {works!r}:
    sizes = dict(one.split(":") for one in given["--shapes"].split(","))
    scale = int(sizes.get("x", sizes.get("between")).split("x")[0])
    for one in given["--loadInputs"].split(","):
        name, path = one.split(":")
        size = 1
        for axis in sizes.get(name, "1").split("x"):
            size *= int(axis)
        assert os.path.getsize(path) in (2 * size, 4 * size), one
    json.dump([{{"computeMs": scale + i / 10}} for i in range(3)], open(given["--exportTimes"], "w"))
else:
    print("[11/27/2026-00:00:00] [E] Error[3]: it has no such profile")
    sys.exit(1)
"""


def program(folder: Path, *, help: str = "--useProfile", works: bool = True) -> Path:
    path = folder / "trtexec"
    path.write_text(PROGRAM.format(help=help, works=works))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("version", "told"), [("8.6.0", True), ("10.16.1.11", True), ("11.1.0.106", False)])
def test_both_majors_are_asked_for_the_same(version, told):
    words = trtexec.command(Path("trtexec"), version, Path("step.engine"), Path("p.so"), RUN, Path("t.json"))
    assert words[:4] == [
        "trtexec",
        "--loadEngine=step.engine",
        "--dynamicPlugins=p.so",
        "--shapes=x:4x2x8,keep_slots:3",
    ]
    assert "--useProfile=2" in words and "--exportTimes=t.json" in words
    values = {"x": Path("0.bin"), "keep_slots": Path("1.bin")}
    loaded = trtexec.command(Path("trtexec"), version, Path("step.engine"), Path("p.so"), RUN, Path("t.json"), values)
    assert set(loaded) - set(words) == {"--loadInputs=x:0.bin,keep_slots:1.bin"}
    # 11 captures a CUDA graph, copies nothing and spins by itself, and warns of being told so.
    assert all((word in words) is told for word in ("--useCudaGraph", "--noDataTransfers", "--useSpinWait"))


@pytest.fixture
def session(mock, monkeypatch):  # noqa: F811
    session = Session(mock.root, "tensorrt")
    session.generate(["disc"], [0])
    monkeypatch.setattr(trtexec, "time_alone", lambda *_: 0.75)
    return session


def test_every_scale_is_measured_in_both_programs(session, tmp_path):
    measured = trtexec.measure(session, program(tmp_path), prompt_classes=("object",))
    steps = session.bundle.manifest.schedules["object"].steps
    assert [row["scale"] for row in measured["scales"]] == [step.scale for step in steps]
    assert [row["trtexec_ms"] for row in measured["scales"]] == [step.tokens + 0.1 for step in steps]
    assert all(row["loop_ms"] >= 0 and row["trtexec_runs"] == 3 for row in measured["scales"])
    assert all(row["runs_ms"] == 0.5 for row in measured["scales"]), "by events, not by the host's clock"
    assert all(row["alone_ms"] == 0.75 for row in measured["scales"]), "ours again where the two differ"
    table = trtexec.markdown(measured)
    assert len([line for line in table if line.startswith("| object |")]) == len(steps)


def test_trtexec_is_started_again_where_it_differs(session, monkeypatch):
    given = iter([{"trtexec_ms": 2.0}, {"trtexec_ms": 1.01}, {"trtexec_missing": "gone"}])
    monkeypatch.setattr(trtexec, "_theirs", lambda *_: next(given))
    best = trtexec._best_of_theirs(Path("trtexec"), session, session.target, None, 1.0)
    assert best == {"trtexec_ms": 1.01, "trtexec_processes_ms": [2.0, 1.01]}
    row = {"prompt_class": "a", "scale": 3, "loop_ms": 1.1, "runs_ms": 1.0, **best}
    table = "\n".join(trtexec.markdown({"bundle": "b", "version": "11", "scales": [row]}))
    assert "within 3%" in table and "processes, which took 2.000, 1.010" in table

    assert trtexec._best_of_theirs(Path("trtexec"), session, session.target, None, 1.0) == {"trtexec_missing": "gone"}
    monkeypatch.setattr(trtexec, "_theirs", lambda *_: {"trtexec_ms": 2.0})  # never the same: no more than three
    worst = trtexec._best_of_theirs(Path("trtexec"), session, session.target, None, 1.0)
    assert worst["trtexec_processes_ms"] == [2.0, 2.0, 2.0]


def test_the_times_of_stages_are_added(mock, tmp_path, monkeypatch):  # noqa: F811
    mock.cut_step()
    asked = []

    def time_alone(engine, profile, shapes, values, runs):
        assert engine.is_file() and values.keys() <= shapes.keys() and all(path.is_file() for path in values.values())
        asked.append((engine.name, profile, runs))
        return 4.0

    monkeypatch.setattr(trtexec, "time_alone", time_alone)
    session = Session(mock.root, "tensorrt")
    rows = trtexec.measure(session, program(tmp_path), prompt_classes=("object",))["scales"]
    steps = session.bundle.manifest.schedules["object"].steps
    assert [row["trtexec_ms"] for row in rows] == [round(2 * (step.tokens + 0.1), 4) for step in steps]
    assert [row["profile"] for row in rows] == [[i, i] for i in range(len(steps))]
    assert all(row["alone_ms"] == 8.0 for row in rows), "ours, which took 0.5 ms beside other engines"
    assert asked == [(f"{name}.engine", i, 1000) for i in range(len(steps)) for name in ("step", "step.1")]


def test_what_trtexec_cannot_run_has_its_reason(session, tmp_path):
    rows = trtexec.measure(session, program(tmp_path, help="", works=False))["scales"]
    assert rows[0]["trtexec_missing"] == "Error[3]: it has no such profile"
    assert rows[1]["trtexec_missing"] == "this trtexec runs profile 0 of an engine only, the scale has 1"
    assert "| - | - | this trtexec runs profile 0" in "\n".join(
        trtexec.markdown({"bundle": "b", "version": "8", "scales": rows})
    )


@pytest.mark.parametrize(
    ("runs_ms", "loop_ms", "why"),
    [
        (1.02, 1.2, "within 3%"),
        (0.9, 0.98, "not explained by the host"),
        (0.9, 0.92, "not explained by the host"),
        (1.1, 1.2, "not explained by the host"),
    ],
)
def test_a_difference_has_a_reason_or_says_that_it_has_none(runs_ms, loop_ms, why):
    row = {"prompt_class": "a", "scale": 3, "loop_ms": loop_ms, "runs_ms": runs_ms, "trtexec_ms": 1.0}
    (line,) = [
        line for line in trtexec.markdown({"bundle": "b", "version": "11", "scales": [row]}) if line.startswith("| a")
    ]
    assert why in line and f"{runs_ms - 1:+.1%}" in line and f"{loop_ms - runs_ms:.3f} ms" in line


@pytest.mark.parametrize(
    ("runs_ms", "alone_ms", "why"),
    [
        (0.9, 0.99, "| ours with the engine alone in a process, as in trtexec, takes 0.990 ms (-1.0%); the loop's"),
        (0.9, 0.94, "| not explained by the host; the loop's launch and wait: 0.100 ms; ours alone: 0.940 ms |"),
        (0.99, 0.9, "| within 3%; the loop's"),
    ],
)
def test_ours_alone_is_the_reason_where_it_is_as_fast_as_trtexec(runs_ms, alone_ms, why):
    row = {"prompt_class": "a", "scale": 3, "loop_ms": 1, "runs_ms": runs_ms, "alone_ms": alone_ms, "trtexec_ms": 1.0}
    assert why in "\n".join(trtexec.markdown({"bundle": "b", "version": "11", "scales": [row]}))


def test_what_cannot_run_alone_has_its_reason(session, tmp_path, monkeypatch):
    def time_alone(*_):
        raise TargetError("step.engine in a process of its own: no memory")

    monkeypatch.setattr(trtexec, "time_alone", time_alone)
    measured = trtexec.measure(session, program(tmp_path), prompt_classes=("object",))
    table = "\n".join(trtexec.markdown(measured))
    assert table.count("ours alone: step.engine in a process of its own: no memory") == len(measured["scales"]) > 1


def test_engines_of_another_target_are_refused(tmp_path):
    from . import tiny

    session = Session(tiny.write_bundle(tmp_path / "b"), threads=1)
    with pytest.raises(InputError, match="runs engines of target tensorrt, not of onnxruntime"):
        trtexec.measure(session, program(tmp_path))


def test_trtexec_is_found_or_missed_with_its_variable(tmp_path, monkeypatch):
    monkeypatch.setattr(trtexec, "_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv(trtexec.ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(TargetError, match="set TOPROVAR_TRTEXEC to it"):
        trtexec.find_trtexec()
    monkeypatch.setenv(trtexec.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(TargetError, match="where no file is"):
        trtexec.find_trtexec()
    here = program(tmp_path)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.delenv(trtexec.ENVIRONMENT_VARIABLE)
    assert trtexec.find_trtexec() == here
