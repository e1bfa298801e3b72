"""The stages one after another: load, calibrate, plan, prune, graph, engine, package; a typed artefact between any two.

Source --load--> Checkpoint --measure--> Calibration --decide--> Plan --assemble--> the bundle's folder
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toprovar import backbones
from toprovar.backbones.base import Backbone
from toprovar.backbones.checkpoint import checkpoint_files
from toprovar.errors import FormatError, InputError
from toprovar.exporter.calibrate import calibrate, model_shape
from toprovar.exporter.graph import GraphExporter
from toprovar.exporter.package import label_prompt, precision_for, write_bundle
from toprovar.exporter.plan import make_dense_plan, make_plan
from toprovar.exporter.source import SamplingWish, Source, named_profile
from toprovar.profiles.calibration import Calibration, load_calibration
from toprovar.profiles.files import pretty_json
from toprovar.profiles.manifest import Condition, Label, Manifest, sha256_checkpoint
from toprovar.profiles.plan import Plan, load_plan
from toprovar.profiles.profile import Profile

__all__ = ["Checkpoint", "assemble", "decide", "export", "load", "measure"]

OnStage = Callable[[str], None]

DEFAULT_CLASS = "default"
"""Prompt class of labels that no one sorted."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, its identity, its labels, and the exporter that keeps the graphs it has made."""

    source: Source
    backbone: Backbone
    sha256: str
    labels: tuple[Label, ...]
    graphs: GraphExporter

    @property
    def prompt_classes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label.prompt_class for label in self.labels))


def load(source: Source, sampling: SamplingWish | None = None, precision: str = "fp32") -> Checkpoint:
    """Read a model, and hash its files.

    Args:
        sampling: the user's wish, over what suits the checkpoint and what its backbone does by default.
        precision: of the transformer's matrices, ``fp32`` or ``fp16``.

    Raises:
        CheckpointError: a file that is missing, truncated, unsafe, of another backbone, or incomplete.
        InputError: an unknown backbone, sampling out of range, or labels that do not fit the model.
    """
    files = [checkpoint_files(path) for path in (source.checkpoint, source.vae)]
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    model = backbones.load(source.backbone, source.checkpoint, source.vae, dtype=dtype)
    wish = dataclasses.asdict((sampling or SamplingWish()).over(source.sampling))
    model.sampling = dataclasses.replace(model.sampling, **{k: v for k, v in wish.items() if v is not None})
    count = int(getattr(model.spec, "classes", 0))
    labels = source.labels
    if labels is None:
        labels = tuple(Label(name=str(number), prompt_class=DEFAULT_CLASS) for number in range(count))
    if len(labels) != count:
        raise InputError(f"{source.checkpoint}: has {count} classes, but {len(labels)} labels are given; give one each")
    return Checkpoint(source, model, sha256_checkpoint(*files), labels, GraphExporter(model))


def measure(
    checkpoint: Checkpoint,
    *,
    prompts_per_class: int = 4,
    seeds: Sequence[int] = (0, 1),
    output: Path | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
) -> Calibration:
    """Calibrate with some labels of every prompt class, spread evenly; see `toprovar.exporter.calibrate`.

    Raises:
        InputError: no prompts or no seeds.
        CheckpointError: an entropy is not finite.
    """
    if prompts_per_class < 1:
        raise InputError(f"calibration: {prompts_per_class} prompts per class; give 1 or more")
    prompts: dict[str, list[int | str]] = {}
    for name in checkpoint.prompt_classes:
        members = [number for number, label in enumerate(checkpoint.labels) if label.prompt_class == name]
        prompts[name] = list(_spread(members, prompts_per_class))
    return calibrate(
        checkpoint.backbone,
        prompts,
        seeds,
        checkpoint_sha256=checkpoint.sha256,
        output=output,
        batch_size=batch_size,
        progress=progress,
    )


def needs_calibration(profile: Profile) -> bool:
    """Whether a plan of this profile depends on measurements; `dense_profile` does not."""
    return profile.tokens.keep != {} or bool(profile.classes)


def decide(checkpoint: Checkpoint, profile: Profile, calibration: Calibration | None) -> Plan:
    """The plan of a profile for this checkpoint.

    Raises:
        FormatError: a calibration of another checkpoint, or a profile that does not fit the model.
    """
    if calibration is not None:
        calibration.check_checkpoint(checkpoint.sha256)
    if not needs_calibration(profile):
        return make_dense_plan(model_shape(checkpoint.backbone), checkpoint.sha256, checkpoint.prompt_classes, profile)
    if calibration is None:
        raise FormatError(f"profile {profile.name}: prunes by measurements; give a calibration")
    unmeasured = sorted(set(checkpoint.prompt_classes) - set(calibration.classes))
    if unmeasured:
        raise FormatError(
            f"calibration: prompt class {unmeasured[0]!r} of the labels is not in it; it has "
            f"{', '.join(calibration.classes)}; calibrate with these labels"
        )
    return make_plan(profile, calibration, checkpoint.backbone.spec)


def assemble(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration | None,
    output: Path,
    *,
    target: str = "onnxruntime",
    golden_seed: int = 0,
    golden_images: int = 1,
    engine_cache: Path | None = None,
    on_stage: OnStage = lambda what: None,
) -> Manifest:
    """Prune, export, build engines and package; see `toprovar.exporter.package.write_bundle`.

    Args:
        golden_seed: of the first image of each prompt class in the golden trace.
        golden_images: images per prompt class in it, of different labels.

    Raises:
        InputError, FormatError, TargetError, ToprovarError: as `write_bundle`.
    """
    golden = {}
    for name in plan.classes:
        members = [number for number, label in enumerate(checkpoint.labels) if label.prompt_class == name]
        labels = _spread(members, golden_images)
        if labels:
            golden[name] = label_prompt(labels, range(golden_seed, golden_seed + len(labels)))
    return write_bundle(
        output,
        checkpoint.graphs,
        plan,
        name=output.name.removesuffix(".bundle"),
        condition=Condition(kind="label", labels=checkpoint.labels),
        golden=golden,
        target=target,
        documents={} if calibration is None else {"calibration.json": pretty_json(calibration)},
        engine_cache=engine_cache,
        on_stage=on_stage,
    )


def export(
    source: Source,
    *,
    profile: str = "balanced",
    calibration: Path | None = None,
    plan: Path | None = None,
    drop_scales: int | None = None,
    targets: Sequence[str] = ("onnxruntime",),
    precision: str = "auto",
    sampling: SamplingWish | None = None,
    prompts_per_class: int = 4,
    seeds: Sequence[int] = (0, 1),
    golden_seed: int = 0,
    output: Path | None = None,
    force: bool = False,
    on_stage: OnStage = lambda what: None,
) -> Path:
    """From a checkpoint to a bundle, all stages.

    Everything that can be refused without the checkpoint is refused before it is read. An interrupted calibration goes
    on where it stopped when the same export is run again.

    Args:
        source: the model.
        profile: name or path; not looked at where a plan is given.
        calibration: a file to read; None measures, if the profile needs it.
        plan: a file to read in place of deciding.
        drop_scales, precision: in place of the profile's own.
        targets: what the bundle is for; onnxruntime runs the graphs of every bundle.
        sampling: the user's wish.
        prompts_per_class, seeds: of the calibration.
        golden_seed: of the golden trace.
        output: the bundle's folder; default ``<source>-<profile>.bundle`` in the current folder.
        force: replace a bundle that is there.

    Returns: the bundle's folder.

    Raises:
        InputError: options that contradict each other, or an output that is there.
        FormatError: a profile, calibration or plan that is broken, or belongs to another checkpoint.
        CheckpointError, TargetError, ToprovarError: of the stages.
    """
    target = _one_target(targets)
    if plan is not None and (drop_scales is not None or precision != "auto"):
        raise InputError(
            "export: a plan has decided on scales and precision; give a profile in its place to change them"
        )
    given = None if plan is None else load_plan(plan)
    wish = named_profile(profile, drop_scales, precision) if given is None else given.profile
    measured = None if calibration is None else load_calibration(calibration)
    output = Path(f"{source.name}-{wish.name}.bundle") if output is None else output
    if output.exists() and not force:
        raise InputError(f"{output}: is there already; --force replaces it, -o names another")

    needed = precision_for(wish.precision, target)
    measures = given is None and measured is None and needs_calibration(wish)
    on_stage(f"load {source.checkpoint.name} and {source.vae.name}")
    checkpoint = load(source, sampling, "fp32" if measures else needed)
    kept = output.with_name(f".{output.name}.calibration.json")
    if measures:
        on_stage("calibrate")
        measured = measure(checkpoint, prompts_per_class=prompts_per_class, seeds=seeds, output=kept)
        kept.unlink()  # it goes into the bundle; what an interrupt leaves is the partial file beside it
        if needed != "fp32":
            checkpoint = load(source, sampling, needed)
    if given is None:
        on_stage(f"plan {wish.name}")
        decided = decide(checkpoint, wish, measured)
    else:
        given.check_checkpoint(checkpoint.sha256, str(plan))
        if measured is not None and measured.sha256 != given.calibration_sha256:
            raise FormatError(f"{plan}: was not made from {calibration}; give the calibration that it was made from")
        decided = given
    assemble(checkpoint, decided, measured, output, target=target, golden_seed=golden_seed, on_stage=on_stage)
    return output


def _one_target(targets: Sequence[str]) -> str:
    """What engines are built for; onnxruntime alone needs none."""
    for target in targets:
        precision_for("auto", target)  # refuses an unknown one
    engines = sorted(set(targets) - {"onnxruntime"})
    if len(engines) > 1:
        raise InputError(f"export: a bundle has engines of one target, not of {' and '.join(engines)}; export twice")
    return engines[0] if engines else "onnxruntime"


def _spread(values: Sequence[int], count: int) -> list[int]:
    """`count` of them (or all), evenly spread."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]
