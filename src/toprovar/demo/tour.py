"""``toprovar demo``: the embedded checkpoint through the whole of toprovar, on any machine, in minutes.

Calibrate once, then a bundle each for the dense model, for dropped scales and nothing else, and for every shipped
profile; pictures and figures of all of them on one page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toprovar.demo.embedded import embedded_source
from toprovar.demo.labels import PROMPT_CLASSES
from toprovar.exporter import build
from toprovar.exporter.source import named_profile
from toprovar.profiles.calibration import save_calibration
from toprovar.profiles.profile import SHIPPED
from toprovar.runtime import report
from toprovar.runtime.session import Session

__all__ = ["run"]

DROPPED_SCALES = 2
"""Of the row that drops scales and does nothing else."""


def run(
    output: Path,
    *,
    threads: int | None = None,
    seed: int = 0,
    repeat: int = 3,
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
    output.mkdir(parents=True, exist_ok=True)
    on_stage("load the embedded checkpoint")
    checkpoint = build.load(embedded_source())
    on_stage("calibrate")
    calibration = build.measure(checkpoint, per_class=2, seeds=[seed])
    save_calibration(output / "calibration.json", calibration)

    wishes = [
        named_profile("dense"),
        named_profile("dense", DROPPED_SCALES),
        *(named_profile(name, own=checkpoint.source.profiles) for name in SHIPPED),
    ]
    bundles = []
    for wish in wishes:
        on_stage(f"export {wish.name}")
        plan = build.decide(checkpoint, wish, calibration)
        bundles.append(output / f"{wish.name}.bundle")
        build.assemble(checkpoint, plan, calibration if "d" in plan.roles else None, bundles[-1], golden_seed=seed)
    del checkpoint

    on_stage("verify, measure and compare")
    sessions = [Session(bundle, threads=threads) for bundle in bundles]
    labels = [names[i] for names in PROMPT_CLASSES.values() for i in (0, -1)]
    # The golden traces, replayed first, have warmed everything up.
    made = report.make(sessions, labels, [seed + i for i in range(len(labels))], repeat=repeat, warmup=0)
    return report.write(made, output / "report.html")
