"""The stages one after another: load, calibrate, plan, prune, graph, engine, package; a typed artefact between any two.

Source --load--> Checkpoint --measure--> Calibration --decide--> Plan --assemble--> the bundle's folder

A text-conditional model's prompts are encoded before it is loaded (`toprovar.exporter.text`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from toprovar import backbones
from toprovar.backbones.base import Backbone
from toprovar.backbones.checkpoint import checkpoint_files
from toprovar.errors import CheckpointError, FormatError, InputError, TargetError
from toprovar.exporter.calibrate import calibrate, labels_condition, model_shape
from toprovar.exporter.graph import GraphExporter
from toprovar.exporter.package import GoldenPrompt, TextPart, precision_for, write_bundle
from toprovar.exporter.plan import make_dense_plan, make_plan
from toprovar.exporter.source import SamplingWish, Source, TextSource, named_profile
from toprovar.exporter.text import EncodedPrompts, discriminants, encode
from toprovar.profiles.calibration import Calibration, load_calibration
from toprovar.profiles.files import pretty_json
from toprovar.profiles.manifest import Condition, Label, Manifest, sha256_checkpoint
from toprovar.profiles.plan import Plan, load_plan
from toprovar.profiles.profile import Profile
from toprovar.profiles.prompts import Prompt, read_prompts

__all__ = ["Checkpoint", "assemble", "calibrate_source", "decide", "export", "load", "measure", "usable_device"]

T = TypeVar("T")
OnStage = Callable[[str], None]

DEFAULT_CLASS = "default"
"""Prompt class of labels and texts that no one sorted."""

LABELS_PER_CLASS = 4
"""That calibration makes pictures of, where no number is wished for."""

EXAMPLE = Prompt("a photograph of a lighthouse on a cliff at sunset", DEFAULT_CLASS)
"""What the golden trace shows where nothing is calibrated and no prompt is given."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, its identity, what pictures it is asked for, and the exporter that keeps the graphs it has made.

    A class-conditional model has labels, a text-conditional one encoded prompts.
    """

    source: Source
    backbone: Backbone
    sha256: str
    labels: tuple[Label, ...]
    prompts: EncodedPrompts | None
    graphs: GraphExporter

    @property
    def prompt_classes(self) -> tuple[str, ...]:
        """As far as they are known before calibration."""
        if self.prompts is not None:
            return tuple(self.prompts.classes or (DEFAULT_CLASS,))
        return tuple(dict.fromkeys(label.prompt_class for label in self.labels))


def usable_device(wish: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is the GPU where there is one.

    Raises:
        TargetError: the GPU was asked for, and PyTorch finds none.
        InputError: no such device.
    """
    if wish not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {wish!r}; valid: auto, cpu, cuda")
    found = torch.cuda.is_available()
    if wish == "cuda" and not found:
        raise TargetError(
            f"device cuda: PyTorch {torch.__version__} finds no GPU; use --device cpu, or install its CUDA build and a driver"
        )
    return "cuda" if found and wish != "cpu" else "cpu"


def load(
    source: Source,
    sampling: SamplingWish | None = None,
    precision: str = "fp32",
    *,
    prompts: EncodedPrompts | Sequence[Prompt] = (),
    device: str = "cpu",
) -> Checkpoint:
    """Read a model, and hash its files.

    Args:
        sampling: the user's wish, over what suits the checkpoint and what its backbone does by default.
        precision: of the transformer's matrices, ``fp32`` or ``fp16``.
        prompts: of a text-conditional model; those that come with the source where none are given.
        device: ``cpu`` or ``cuda``.

    Raises:
        CheckpointError: a file that is missing, truncated, unsafe, of another backbone or size, or incomplete; text
            features of another width.
        InputError: an unknown backbone, sampling out of range, labels or prompts that do not fit the model.
    """
    files = [checkpoint_files(path) for path in (source.checkpoint, source.vae)]
    encoded = None
    if isinstance(prompts, EncodedPrompts):
        encoded = prompts
    elif source.text is not None:
        encoded = encode(source.text, prompts or source.text.prompts, device)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    options = {"dtype": dtype, "device": torch.device(device), **source.load_options}
    model = backbones.load(source.backbone, source.checkpoint, source.vae, **options)
    _check_size(source, model, encoded)
    wish = dataclasses.asdict((sampling or SamplingWish()).over(source.sampling))
    model.sampling = dataclasses.replace(model.sampling, **{k: v for k, v in wish.items() if v is not None})
    count = int(getattr(model.spec, "classes", 0))
    labels = source.labels
    if labels is None:
        labels = tuple(Label(name=str(number), prompt_class=DEFAULT_CLASS) for number in range(count))
    if len(labels) != count:
        raise InputError(f"{source.checkpoint}: has {count} classes, but {len(labels)} labels are given; give one each")
    return Checkpoint(source, model, sha256_checkpoint(*files), labels, encoded, GraphExporter(model))


def _check_size(source: Source, model: Backbone, encoded: EncodedPrompts | None) -> None:
    """Raises CheckpointError or InputError where the checkpoint is not what was named, or does not take these texts."""
    found = (model.spec.depth, model.spec.width)
    if source.size is not None and found != source.size:
        wanted = f"{source.size[0]} layers of width {source.size[1]}"
        raise CheckpointError(
            f"{source.checkpoint}: has {found[0]} layers of width {found[1]}, and the backbone that was named {wanted}; "
            "give its checkpoint, or --backbone infinity for any size"
        )
    if encoded is None:
        return
    width, most = getattr(model.spec, "text_width", 0), getattr(model.spec, "text_maximum_tokens", 0)
    if encoded.text.features.shape[2] != width:
        raise CheckpointError(
            f"text features have {encoded.text.features.shape[2]} channels, and {source.checkpoint} was trained on {width}; "
            "give the text encoder that belongs to it"
        )
    if (longest := int(encoded.text.lengths.max())) > most:
        raise InputError(f"prompts: one has {longest} tokens, and the model takes {most}; shorten it")


def measure(
    checkpoint: Checkpoint,
    *,
    per_class: int | None = None,
    seeds: Sequence[int] = (0, 1),
    output: Path | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
) -> Calibration:
    """Calibrate; see `toprovar.exporter.calibrate`.

    Args:
        per_class: how many labels or prompts of each prompt class, evenly spread; default: `LABELS_PER_CLASS` labels, all
            prompts. Prompts without a class are all measured, and sorted by what was found.

    Raises:
        InputError: no prompts or no seeds.
        CheckpointError: an entropy is not finite.
    """
    if per_class is not None and per_class < 1:
        raise InputError(f"calibration: {per_class} prompts per class; give 1 or more")
    encoded = checkpoint.prompts
    if encoded is None:
        labels: dict[str, list[int | str]] = {}
        for number, label in enumerate(checkpoint.labels):
            labels.setdefault(label.prompt_class, []).append(number)
        return calibrate(
            checkpoint.backbone,
            {name: _spread(members, per_class or LABELS_PER_CLASS) for name, members in labels.items()},
            seeds,
            checkpoint_sha256=checkpoint.sha256,
            output=output,
            batch_size=batch_size,
            progress=progress,
        )
    known, pooled = encoded.classes, encoded.pooled()
    count = per_class or (checkpoint.source.text.per_class if checkpoint.source.text else None)
    chosen: dict[str, list[int | str]] | list[str] = [prompt.text for prompt in encoded.prompts]
    if known is not None:
        chosen = {name: list(_spread(texts, count or len(texts))) for name, texts in known.items()}
    return calibrate(
        checkpoint.backbone,
        chosen,
        seeds,
        checkpoint_sha256=checkpoint.sha256,
        condition=encoded.condition,
        condition_sha256=encoded.sha256,
        tell_apart=lambda found: discriminants(known or {n: [str(t) for t in of] for n, of in found.items()}, pooled),
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
        classes = checkpoint.prompt_classes
        if checkpoint.prompts is not None and calibration is not None:
            classes = tuple(calibration.classes)
        return make_dense_plan(model_shape(checkpoint.backbone), checkpoint.sha256, classes, profile)
    if calibration is None:
        raise FormatError(f"profile {profile.name}: prunes by measurements; give a calibration")
    unmeasured = sorted({label.prompt_class for label in checkpoint.labels} - set(calibration.classes))
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
    golden, examples = {}, []
    for name, wanted in _golden_prompts(checkpoint, plan, calibration, golden_images).items():
        condition = labels_condition if checkpoint.prompts is None else checkpoint.prompts.condition
        golden[name] = GoldenPrompt(condition(wanted), tuple(range(golden_seed, golden_seed + len(wanted))))
        examples += [Label(name=str(one), prompt_class=name) for one in wanted]
    text, spec = None, checkpoint.backbone.spec
    condition_info = Condition(kind="label", labels=checkpoint.labels)
    if checkpoint.source.text is not None:
        told_apart = None if calibration is None else calibration.discriminants
        known = checkpoint.prompts and checkpoint.prompts.classes
        if calibration is None and checkpoint.prompts and known and len(known) > 1:
            told_apart = discriminants(known, checkpoint.prompts.pooled())
        text = TextPart(checkpoint.source.text, told_apart)
        condition_info = Condition(
            kind="text",
            text_width=getattr(spec, "text_width", None),
            text_maximum_tokens=getattr(spec, "text_maximum_tokens", None),
            examples=tuple(examples),
        )
    return write_bundle(
        output,
        checkpoint.graphs,
        plan,
        name=output.name.removesuffix(".bundle"),
        condition=condition_info,
        golden=golden,
        target=target,
        text=text,
        load_options=checkpoint.source.load_options,
        documents={} if calibration is None else {"calibration.json": pretty_json(calibration)},
        engine_cache=engine_cache,
        on_stage=on_stage,
    )


def _golden_prompts(
    checkpoint: Checkpoint, plan: Plan, calibration: Calibration | None, count: int
) -> dict[str, list[int | str]]:
    """By prompt class, `count` labels or texts that the golden trace shows; none where a class has none.

    Texts are those that the class was calibrated with; where these have no features here (they came from another file),
    the one text that is most like the class.
    """
    encoded = checkpoint.prompts
    members: dict[str, list[int | str]] = {name: [] for name in plan.classes}
    if encoded is None:
        for number, label in enumerate(checkpoint.labels):
            members.setdefault(label.prompt_class, []).append(number)
    else:
        texts = {prompt.text for prompt in encoded.prompts}
        known = encoded.classes or dict.fromkeys(plan.classes, sorted(texts)[:1])
        for name in plan.classes:
            measured = [] if calibration is None else calibration.classes[name].prompts
            members[name] = [text for text in measured if text in texts] or list(known.get(name, sorted(texts)[:1]))
        if calibration is not None and calibration.discriminants and not texts & _measured_texts(calibration):
            pooled = encoded.pooled()
            for name, one in calibration.discriminants.items():
                weights = np.array(one.weights)
                members[name] = [max(pooled, key=lambda text, w=weights: float(pooled[text] @ w))]  # type: ignore[misc]
    return {name: _spread(of, count) for name, of in members.items() if of}


def _measured_texts(calibration: Calibration) -> set[str]:
    return {str(prompt) for one in calibration.classes.values() for prompt in one.prompts}


def calibrate_source(
    source: Source,
    *,
    output: Path,
    prompts: Path | None = None,
    sampling: SamplingWish | None = None,
    per_class: int | None = None,
    seeds: Sequence[int] = (0, 1),
    batch_size: int = 4,
    device: str = "auto",
    on_stage: OnStage = lambda what: None,
) -> Calibration:
    """Load and measure; arguments as `export` and `measure`.

    Raises:
        InputError, CheckpointError, TargetError: of the stages; prompts for a model that takes labels, or none for one
            that takes text.
    """
    device = usable_device(device)
    given: Sequence[Prompt] = ()
    if prompts is not None:
        if source.text is None:
            raise InputError(f"--prompts: {source.backbone} takes labels, not text; see --labels")
        given = read_prompts(prompts)
    elif source.text is not None and source.text.features is None and not source.text.prompts:
        raise InputError("--prompts is missing: give prompts to calibrate with, a text file of one a line")
    on_stage(f"load {source.checkpoint.name} and {source.vae.name}")
    checkpoint = load(source, sampling, _measuring_precision(device), prompts=given, device=device)
    on_stage("calibrate")
    return measure(checkpoint, per_class=per_class, seeds=seeds, output=output, batch_size=batch_size)


def _measuring_precision(device: str) -> str:
    """fp32 on a CPU; half precision on a GPU, which the kernels there are made for."""
    return "fp16" if device == "cuda" else "fp32"


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
    per_class: int | None = None,
    seeds: Sequence[int] = (0, 1),
    golden_seed: int = 0,
    device: str = "auto",
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
        calibration: a calibration to read (``.json``), or a file of prompts to calibrate with, of a text-conditional model;
            None measures with what comes with the source, if the profile needs it.
        plan: a file to read in place of deciding.
        drop_scales, precision: in place of the profile's own.
        targets: what the bundle is for; onnxruntime runs the graphs of every bundle.
        sampling: the user's wish.
        per_class, seeds: of the calibration, see `measure`.
        golden_seed: of the golden trace.
        device: ``auto``, ``cpu`` or ``cuda``, of calibration, text encoder and golden trace.
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
    wish = named_profile(profile, drop_scales, precision, source.profiles) if given is None else given.profile
    prompts: Sequence[Prompt] | EncodedPrompts = ()
    measured = None
    if calibration is not None and calibration.suffix == ".json":
        measured = load_calibration(calibration)
    elif calibration is not None:
        if source.text is None:
            raise InputError(
                f"{calibration}: a calibration of a model that takes labels ends in .json; give one, or none"
            )
        prompts = read_prompts(calibration)
    output = Path(f"{source.name}-{wish.name}.bundle") if output is None else output
    if output.exists() and not force:
        raise InputError(f"{output}: is there already; --force replaces it, -o names another")
    device = usable_device(device)

    needed = precision_for(wish.precision, target)
    measures = given is None and measured is None and (needs_calibration(wish) or bool(prompts))
    if source.text is not None and not prompts and source.text.features is None:
        prompts = _prompts_of(source.text, measured, measures)
    on_stage(f"load {source.checkpoint.name} and {source.vae.name}")
    precision = _measuring_precision(device) if measures else needed
    checkpoint = load(source, sampling, precision, prompts=prompts, device=device)
    kept = output.with_name(f".{output.name}.calibration.json")
    if measures:
        on_stage("calibrate")
        measured = measure(checkpoint, per_class=per_class, seeds=seeds, output=kept)
        kept.unlink()  # it goes into the bundle; what an interrupt leaves is the partial file beside it
        if needed != precision:
            encoded = checkpoint.prompts or ()
            del checkpoint  # never both in memory
            checkpoint = load(source, sampling, needed, prompts=encoded, device=device)
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


def _prompts_of(text: TextSource, measured: Calibration | None, measures: bool) -> Sequence[Prompt]:
    """Whose features an export needs, where neither prompts nor features were given.

    Raises:
        InputError: there is nothing to calibrate with.
    """
    if measured is not None:
        return [Prompt(str(text), name) for name, one in measured.classes.items() for text in one.prompts]
    if text.prompts:
        return text.prompts
    if measures:
        raise InputError(
            "--calibration is missing: give prompts to calibrate with, a text file of one a line, or a calibration (.json)"
        )
    return [EXAMPLE]


def _one_target(targets: Sequence[str]) -> str:
    """What engines are built for; onnxruntime alone needs none."""
    for target in targets:
        precision_for("auto", target)  # refuses an unknown one
    engines = sorted(set(targets) - {"onnxruntime"})
    if len(engines) > 1:
        raise InputError(f"export: a bundle has engines of one target, not of {' and '.join(engines)}; export twice")
    return engines[0] if engines else "onnxruntime"


def _spread(values: Sequence[T], count: int) -> list[T]:
    """`count` of them (or all), evenly spread."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]
