"""``toprovar demo``: the embedded checkpoints through the whole of toprovar, on any machine, in minutes.

Calibrate once, then a bundle each for the dense model, for dropped scales and nothing else, and for shipped profiles;
pictures and figures of all of them on one page. One checkpoint takes class labels, the other one text.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toprovar.demo.embedded import embedded_source, embedded_text_source
from toprovar.demo.labels import PROMPT_CLASSES
from toprovar.exporter import build
from toprovar.exporter.source import Source, named_profile
from toprovar.profiles.calibration import save_calibration
from toprovar.profiles.profile import SHIPPED
from toprovar.runtime import report
from toprovar.runtime.machine import usable_cores
from toprovar.runtime.session import Session

__all__ = ["DEMOS", "Demo", "run"]

EVIDENCE = Path(__file__).parent / "evidence"
"""What `benchmarks/evidence.py` measured of every policy on these checkpoints, shown before what is measured now."""

DROPPED_SCALES = 2
"""Of the row that drops scales and does nothing else."""


@dataclass(frozen=True)
class Demo:
    """One checkpoint of the tour.

    folder: of its bundles. source: the checkpoint. pictures: labels or prompts that the report shows. profiles: those
    that get a bundle. per_class: labels or prompts of each prompt class to calibrate with. The text model is the slower
    one, so it gets less of everything: the whole tour is to take three minutes on two cores.
    """

    folder: str
    source: Callable[[], Source]
    pictures: tuple[str, ...]
    profiles: tuple[str, ...] = SHIPPED
    per_class: int = 2


DEMOS = (
    Demo("class", embedded_source, tuple(names[i] for names in PROMPT_CLASSES.values() for i in (0, -1))),
    Demo(
        "text",
        embedded_text_source,
        (
            "three yellow stars on a purple floor",
            "one white ring on a red checkered floor",
            "three red striped discs on a blue checkered floor",
        ),
        ("fast",),
        per_class=1,
    ),
)


def run(
    output: Path,
    *,
    threads: int | None = None,
    seed: int = 0,
    repeat: int = 2,
    on_stage: Callable[[str], None] = lambda what: None,
) -> tuple[Path, ...]:
    """Make bundles, report and grid in `output`; what is there of an earlier run is replaced.

    Args:
        output: a folder, made where it is missing.
        threads: of ONNX Runtime.
        seed: of the pictures.
        repeat: measured runs per bundle and prompt class.
        on_stage: called with a line before each part of the work.

    Returns: the files of the report.

    Raises:
        ToprovarError: the embedded checkpoint is missing, or the folder cannot be written.
    """
    measured = []
    for demo, bundles in zip(DEMOS, _build_all(output, seed, on_stage), strict=True):
        on_stage(f"{demo.folder} demo: verify, measure and compare")
        measured.append(_measure(demo, bundles, threads, seed, repeat))
    stored = [report.load(path) for path in sorted(EVIDENCE.glob("*.json"))]
    return report.write([*stored, *measured], output / "report.html")


def _build_all(output: Path, seed: int, on_stage: Callable[[str], None]) -> list[list[Path]]:
    """The bundles of every demo. Each is built in a process of its own, since tracing a graph keeps one core busy."""
    context = multiprocessing.get_context("spawn")
    lines: Any = context.Queue()
    cores = max(1, usable_cores() // len(DEMOS))
    with ProcessPoolExecutor(len(DEMOS), context, _begin, (lines, cores)) as pool:
        jobs = [pool.submit(_build, demo, output / demo.folder, seed) for demo in DEMOS]
        while not (all(job.done() for job in jobs) and lines.empty()):
            with contextlib.suppress(queue.Empty):
                on_stage(lines.get(timeout=0.2))
        return [job.result() for job in jobs]


_lines: Any = None
"""Where a building process says what it does."""


def _begin(lines: Any, cores: int) -> None:
    global _lines
    _lines = lines
    torch.set_num_threads(cores)


def _build(demo: Demo, output: Path, seed: int) -> list[Path]:
    """Calibration and bundles of one checkpoint."""

    def say(what: str) -> None:
        _lines.put(f"{demo.folder} demo: {what}")

    output.mkdir(parents=True, exist_ok=True)
    say("load the embedded checkpoint")
    checkpoint = build.load(demo.source())
    say("calibrate")
    calibration = build.measure(checkpoint, per_class=demo.per_class, seeds=[seed], progress=False)
    save_calibration(output / "calibration.json", calibration)

    wishes = [
        named_profile("dense"),
        named_profile("dense", DROPPED_SCALES),
        *(named_profile(name, own=checkpoint.source.profiles) for name in demo.profiles),
    ]
    bundles = []
    for wish in wishes:
        say(f"export {wish.name}")
        plan = build.decide(checkpoint, wish, calibration)
        bundles.append(output / f"{wish.name}.bundle")
        build.assemble(checkpoint, plan, calibration if "d" in plan.roles else None, bundles[-1], golden_seed=seed)
    return bundles


def _measure(demo: Demo, bundles: Sequence[Path], threads: int | None, seed: int, repeat: int) -> report.Part:
    """The bundles of one checkpoint, verified, timed and compared, with nothing else running."""
    sessions = [Session(bundle, threads=threads) for bundle in bundles]
    seeds = [seed + i for i in range(len(demo.pictures))]
    asked: Sequence[str] | None = demo.pictures
    text = None
    if sessions[0].takes_text:
        asked, text = None, sessions[0].encode(demo.pictures)
    # The golden traces, replayed first, have warmed everything up.
    return report.make(sessions, asked, seeds, text=text, captions=demo.pictures, repeat=repeat, warmup=0)
