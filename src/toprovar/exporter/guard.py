"""A plan above a floor, from a checkpoint on disk: which pictures to search on, and what was found as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toprovar.errors import InputError
from toprovar.exporter import build
from toprovar.exporter.calibrate import labels_condition
from toprovar.exporter.plan import make_plan
from toprovar.exporter.search import Found, Judge, Picture, Search, split_pictures
from toprovar.exporter.source import Source
from toprovar.profiles.calibration import Calibration
from toprovar.profiles.plan import Plan
from toprovar.profiles.profile import QualityFloor
from toprovar.profiles.prompts import read_prompts

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SEARCH_SEED", "parse_floor", "pictures_for", "plan_above", "summary"]

SEARCH_SEED = 100
"""First seed of the pictures of a search: those of calibration begin at 0."""


def parse_floor(texts: Sequence[str]) -> QualityFloor:
    """A floor from ``ssim=0.9``, ``psnr_db=30``, ``accuracy=0.97``.

    Raises:
        InputError: no figure of that name, not a number, out of its range, or given twice.
    """
    known = tuple(QualityFloor.model_fields)
    values: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in known or name in values:
            twice = " once" if name in values else ""
            raise InputError(f"floor {text!r}: expected one of {', '.join(f'{one}=NUMBER' for one in known)}{twice}")
        try:
            values[name] = float(number)
        except ValueError:
            raise InputError(f"floor {text!r}: {number!r} is no number; give one like {name}=0.9") from None
        top = float("inf") if name == "psnr_db" else 1.0
        if not 0 <= values[name] <= top:
            raise InputError(f"floor {text!r}: expected 0 to {top:g}")
    return QualityFloor(**values)


def pictures_for(
    calibration: Calibration, known: Mapping[str, Sequence[int | str]], seeds: Sequence[int]
) -> tuple[dict[str, list[Picture]], dict[str, list[Picture]]]:
    """Pictures to search on and pictures held out, by prompt class.

    Search uses the prompts of the calibration, and holds out as many others of the class; where there are no others, as of a
    model with few labels, every other picture is held out.
    """
    searched, held_out = {}, {}
    for name, one in calibration.classes.items():
        others = [prompt for prompt in known.get(name, ()) if prompt not in one.prompts][: len(one.prompts)]
        mine = [prompt for prompt in one.prompts if prompt in known.get(name, ())]
        if others and mine:
            searched[name] = [Picture(prompt, seed) for prompt in mine for seed in seeds]
            held_out[name] = [Picture(prompt, seed) for prompt in others for seed in seeds]
        else:
            halves = split_pictures({name: list(known.get(name, ()))}, seeds)
            searched[name], held_out[name] = halves[0][name], halves[1][name]
    return searched, held_out


def plan_above(
    source: Source,
    calibration: Calibration,
    floor: QualityFloor,
    *,
    name: str = "searched",
    prompts: Path | None = None,
    seeds: Sequence[int] = (SEARCH_SEED, SEARCH_SEED + 1),
    device: str = "auto",
    judge: Callable[[str], Judge] | None = None,
    on_stage: Callable[[str], None] = lambda what: None,
) -> tuple[Plan, Found]:
    """The fastest plan above a floor; see `toprovar.exporter.search`.

    Args:
        source: the model that was calibrated; its labels, or the prompts that come with it, are made pictures of.
        name: of the profile that the plan holds.
        prompts: a prompts file of a text-conditional model, those of the calibration and others to hold out; default: what
            comes with the source.
        seeds: pictures of each prompt.
        device: ``auto``, ``cpu`` or ``cuda``.
        judge: device -> what judges accuracy.

    Raises:
        FormatError: a calibration of another checkpoint.
        InputError: no floor; a class without pictures; accuracy without a judge; prompts for a model that takes labels.
        CheckpointError, TargetError: of loading.
    """
    device = build.usable_device(device)
    on_stage(f"load {source.checkpoint.name} and {source.vae.name}")
    if prompts is not None and source.text is None:
        raise InputError(f"--prompts: {source.backbone} takes labels, not text; leave it out")
    checkpoint = build.load(source, prompts=read_prompts(prompts) if prompts is not None else (), device=device)
    calibration.check_checkpoint(checkpoint.sha256)
    known: dict[str, list[int | str]] = {}
    if checkpoint.prompts is None:
        for number, label in enumerate(checkpoint.labels):
            known.setdefault(label.prompt_class, []).append(number)
    else:
        classes = checkpoint.prompts.classes
        if classes is None:
            raise InputError("search: the prompts have no classes; give a prompts file with a class behind each prompt")
        known = {one: list(texts) for one, texts in classes.items()}
    searched, held_out = pictures_for(calibration, known, seeds)
    search = Search(
        checkpoint.backbone,
        calibration,
        searched,
        held_out,
        labels_condition if checkpoint.prompts is None else checkpoint.prompts.condition,
        judge(device) if judge is not None and floor.accuracy is not None else None,
        on_evaluation=on_stage,
    )
    found = search.find(floor, name)
    return make_plan(found.profile, calibration, checkpoint.backbone.spec), found


def summary(found: Found) -> Table:
    """What was found, as a table: speed in FLOPs, and each figure on the held-out pictures with its interval."""
    from rich.table import Table

    keys = [key for key in ("ssim", "psnr_db", "accuracy") if all(key in one for one in found.measured.values())]
    table = Table(title=f"{found.profile.name}: {found.evaluations} prunings tried", title_justify="left")
    for column in ("prompt class", "FLOPs of dense", *keys):
        table.add_column(column, justify="left" if column == "prompt class" else "right")
    for name, figures in found.measured.items():
        cells = [f"{figures[key].mean:.3f} [{figures[key].low:.3f}, {figures[key].high:.3f}]" for key in keys]
        table.add_row(name, f"{found.cost[name]:.1%}", *cells)
    return table
