"""The engines of a bundle in trtexec and in our runtime, at the same shapes: do we lose anything, and where.

trtexec is asked for what our runtime does: the same values, one CUDA graph, no copies between host and device, a busy wait,
and time to warm up. TensorRT 11 does so by default, 10 and 8.6 have to be told. Each scale is measured three ways:

    loop      as `bench` does, one run at a time by the host's clock: launch, run and wait
    runs      runs of the same CUDA graph queued behind each other, each between two events: what the GPU spends
    trtexec   its median "GPU Compute Time", which is between two events, too

`loop - runs` is what the host's launch and wait cost; `runs - trtexec` is the difference of the two programs on the GPU. One
trtexec is not like the next: of four processes with the same command line three took 1.02 ms and one 1.08 (class demo, scale 9,
H100). So where the difference is more than noise, trtexec is started again, and the fastest of its processes counts. Where it
stays, our runtime is given a process with the engine alone, as trtexec is:

    alone     as `runs`, but the engine is the only one of its process; of stages the sum
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from toprovar.errors import InputError, TargetError
from toprovar.runtime.alone import time_alone
from toprovar.runtime.loop import Loop
from toprovar.runtime.session import Session
from toprovar.runtime.tensorrt import NAME, EngineInputs, EngineRun, TensorRt

__all__ = ["ENVIRONMENT_VARIABLE", "command", "find_trtexec", "markdown", "measure"]

ENVIRONMENT_VARIABLE = "TOPROVAR_TRTEXEC"
_PLACES = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
_WARM_UP_MS = 300
_CLOSE = 0.03
"""A smaller part of trtexec's time is noise."""
_MOST_PROCESSES = 3


def find_trtexec() -> Path:
    """trtexec: what the environment variable names, on the PATH, or where NVIDIA's packages put it.

    Raises:
        TargetError: it is nowhere.
    """
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    if given and not Path(given).is_file():
        raise TargetError(f"{ENVIRONMENT_VARIABLE} is {given!r}, where no file is; set it to trtexec, or unset it")
    for place in (given, shutil.which("trtexec"), *_PLACES):
        if place and Path(place).is_file():
            return Path(place)
    raise TargetError(
        f"trtexec was not found on the PATH or in {', '.join(_PLACES)}; set {ENVIRONMENT_VARIABLE} to it (it comes with "
        "TensorRT's samples)"
    )


def command(
    trtexec: Path,
    version: str,
    engine: Path,
    plugins: Path,
    run: EngineInputs,
    times: Path,
    values: Mapping[str, Path] | None = None,
) -> list[str]:
    """The command line that measures an engine.

    Args:
        times: where trtexec writes every time.
        values: files of raw input values, by input; the others get random numbers.
    """
    major = int(version.split(".")[0])
    shapes = ",".join(f"{name}:{'x'.join(map(str, one.shape))}" for name, one in run.inputs.items() if one.shape)
    words = [str(trtexec), f"--loadEngine={engine}", f"--dynamicPlugins={plugins}", f"--shapes={shapes}"]
    if values:
        words.append("--loadInputs=" + ",".join(f"{name}:{path}" for name, path in values.items()))
    if run.profile:
        words.append(f"--useProfile={run.profile}")
    if major < 11:
        words += ["--useCudaGraph", "--noDataTransfers", "--useSpinWait"]
    return [*words, f"--warmUp={_WARM_UP_MS}", "--duration=1", "--iterations=30", f"--exportTimes={times}"]


def measure(
    session: Session,
    trtexec: Path | None = None,
    *,
    prompt_classes: Sequence[str] = (),
    scales: Collection[int] = (),
    on_run: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Every scale of a bundle's prompt classes in both programs.

    Args:
        session: a bundle on target tensorrt; at least one picture should have been made.
        trtexec: default: `find_trtexec`.
        prompt_classes: default: all. Scales with the same shapes in several classes are measured once.
        scales: default: all.
        on_run: called with (runs of trtexec done, runs in all).

    Returns: what goes into a bench document as ``trtexec``; times in milliseconds. A scale that trtexec cannot run has
        its reason in place of its time.

    Raises:
        InputError: the session runs on another target.
        TargetError: there is no trtexec.
    """
    target = session.target
    if not isinstance(target, TensorRt):
        raise InputError(
            f"bench --trtexec: runs engines of target {NAME}, not of {session.target_name}; give --target {NAME}"
        )
    program = find_trtexec() if trtexec is None else trtexec
    loop = session.loop(session.batch_size)
    several = "--useProfile" in _output([str(program), "--help"])
    todo: dict[tuple[int, ...], tuple[str, int, EngineRun]] = {}
    for name in prompt_classes or session.prompt_classes:
        for turn in loop.turns(name):
            if scales and turn.scale not in scales:
                continue
            assert isinstance(turn.step, EngineRun)
            todo.setdefault(tuple(stage.profile for stage in turn.step.stages), (name, turn.scale, turn.step))
    rows = []
    for done, (profiles, (name, scale, run)) in enumerate(todo.items()):
        on_run(done, len(todo))
        profile = profiles[0] if len(profiles) == 1 else list(profiles)
        row: dict[str, Any] = {"prompt_class": name, "scale": scale, "profile": profile, **_ours(loop, target, run)}
        if any(profiles) and not several:
            row["trtexec_missing"] = f"this trtexec runs profile 0 of an engine only, the scale has {profile}"
        else:
            row |= _best_of_theirs(program, session, target, run, row["runs_ms"])
            if "trtexec_ms" in row and not _close(row["runs_ms"], row["trtexec_ms"]):
                row |= _alone(session, target, run, row["runs_ms"])
        rows.append(row)
    on_run(len(todo), len(todo))
    name, version = session.bundle.manifest.name, target.info.version
    return {"bundle": name, "version": version, "timed": "events", "scales": rows}


def _ours(loop: Loop, target: TensorRt, run: EngineRun) -> dict[str, float]:
    """One run at a time, and runs queued behind each other; medians, after as long a time to warm up as trtexec takes."""
    start = perf_counter()
    while (perf_counter() - start) * 1e3 < _WARM_UP_MS:
        loop.timed(run)
    single = float(np.median([loop.timed(run) for _ in range(30)]))
    queued = target.elapsed(run, _runs_a_second(single))
    return {"loop_ms": round(single, 4), "runs_ms": round(float(np.median(queued)), 4)}


def _best_of_theirs(program: Path, session: Session, target: TensorRt, run: EngineRun, ours: float) -> dict[str, Any]:
    """The fastest process of trtexec, and the medians of all where it took more than one."""
    found: list[dict[str, Any]] = []
    while len(found) < _MOST_PROCESSES:
        found.append(_theirs(program, session, target, run))
        if "trtexec_ms" not in found[-1]:
            return found[-1]
        best = min(found, key=lambda one: float(one["trtexec_ms"]))
        if _close(ours, best["trtexec_ms"]):
            break
    return best if len(found) == 1 else {**best, "trtexec_processes_ms": [one["trtexec_ms"] for one in found]}


def _theirs(program: Path, session: Session, target: TensorRt, run: EngineRun) -> dict[str, Any]:
    """Medians; of several stages, which trtexec runs one at a time, their sum.

    It is given the values of our inputs: how long attention takes depends on them, and so does the GPU's clock.
    """
    medians, fewest = [], 0
    for stage in run.stages:
        with _values(target, stage) as (folder, values):
            engine, times = session.bundle.path(target.info.engines[stage.engine]), folder / "times.json"
            said = _output(command(program, str(target.info.version), engine, target.plugins, stage, times, values))
            try:
                measured = [float(one["computeMs"]) for one in json.loads(times.read_text())]
            except (OSError, ValueError, KeyError):
                measured = []
        if not measured:
            errors = [line for line in said.splitlines() if "[E]" in line]
            reason = errors[0].split("[E]")[1].strip() if errors else f"no times from {program.name}"
            return {"trtexec_missing": reason[:300]}
        medians.append(float(np.median(measured)))
        fewest = min(fewest or len(measured), len(measured))
    return {"trtexec_ms": round(sum(medians), 4), "trtexec_runs": fewest}


def _alone(session: Session, target: TensorRt, run: EngineRun, ours: float) -> dict[str, Any]:
    """As `_theirs`, in our runtime."""
    total, runs = 0.0, _runs_a_second(ours)
    for stage in run.stages:
        with _values(target, stage) as (_, values):
            engine = session.bundle.path(target.info.engines[stage.engine])
            shapes = {name: buffer.shape for name, buffer in stage.inputs.items()}
            try:
                total += time_alone(engine, stage.profile, shapes, values, runs)
            except TargetError as error:  # the other scales are worth their minutes
                return {"alone_missing": str(error)}
    return {"alone_ms": round(total, 4)}


@contextmanager
def _values(target: TensorRt, stage: EngineInputs) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A folder, and in it files of the raw values of an engine's inputs; empty ones have none."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for i, (name, buffer) in enumerate(stage.inputs.items()):
            if buffer.size_bytes:
                files[name] = Path(folder) / f"{i}.bin"
                target.read_bytes(buffer).tofile(files[name])
        yield Path(folder), files


def _runs_a_second(ms: float) -> int:
    return max(10, min(1000, int(1000 / max(ms, 1e-3))))


def _close(ours: float, theirs: float) -> bool:
    return abs(ours / theirs - 1) <= _CLOSE


def _output(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def markdown(measured: Mapping[str, Any]) -> list[str]:
    """The table of what `measure` returned (documents without ``timed`` are of before we used events, as trtexec does)."""
    runs = "each between two events" if measured.get("timed") == "events" else "the mean"
    lines = [
        f"## {measured['bundle']}: our runtime and trtexec, TensorRT {measured['version']}",
        "",
        f"Milliseconds of one step. loop: one at a time by the host's clock; runs: queued behind each other, {runs}; trtexec: "
        "median GPU compute time of the same engine, shapes, profile and input values, with CUDA graphs and no copies (of "
        "stages: their sum).",
        "",
        "| class | scale | loop | runs | trtexec | runs to trtexec | why |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in measured["scales"]:
        start = f"| {row['prompt_class']} | {row['scale']} | {row['loop_ms']:.3f} | {row['runs_ms']:.3f} | "
        if "trtexec_ms" not in row:
            lines.append(f"{start}- | - | {row['trtexec_missing']} |")
            continue
        difference = row["runs_ms"] / row["trtexec_ms"] - 1
        host = f"the loop's launch and wait: {row['loop_ms'] - row['runs_ms']:.3f} ms"
        alone = row.get("alone_ms")
        if _close(row["runs_ms"], row["trtexec_ms"]):
            why = f"within {_CLOSE:.0%}; {host}"
        elif alone is not None and _close(alone, row["trtexec_ms"]):
            why = (
                f"ours with the engine alone in a process, as in trtexec, takes {alone:.3f} ms "
                f"({alone / row['trtexec_ms'] - 1:+.1%}); {host}"
            )
        else:
            why = f"not explained by the host; {host}"
            if "alone_missing" in row:
                why += f"; ours alone: {row['alone_missing']}"
            elif alone is not None:
                why += f"; ours alone: {alone:.3f} ms"
        if processes := row.get("trtexec_processes_ms"):
            why += f"; the fastest of trtexec's processes, which took {', '.join(f'{ms:.3f}' for ms in processes)}"
        lines.append(f"{start}{row['trtexec_ms']:.3f} | {difference:+.1%} | {why} |")
    return [*lines, ""]
