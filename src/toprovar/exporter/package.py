"""Plan and graphs -> a bundle: a folder that is complete or not there (see `profiles.manifest` for what is in it)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from .. import __version__
from ..backbones.base import Backbone, restore_constants
from ..backbones.generate import Trace, generate
from ..errors import InputError
from ..kernels.contract import CONTRACT_VERSION
from ..profiles import manifest as formats
from ..profiles.calibration import Discriminant
from ..profiles.files import pretty_json, sha256_bytes, sha256_file, write_bytes, write_error, write_text
from ..profiles.manifest import (
    Condition,
    FileInfo,
    GraphInfo,
    Manifest,
    ModelInfo,
    Provenance,
    Sampling,
    ScaleStep,
    Schedule,
    TargetInfo,
)
from ..profiles.manifest import LoopNames as Names
from ..profiles.noise import scale_noise
from ..profiles.plan import Plan, save_plan
from .engine import EngineOptions, build_engines, open_builder
from .graph import GRAPHS, Graph, GraphExporter, save_graph
from .prune import check_fit, pruning, schedules
from .source import TextSource
from .text import write_encoder

__all__ = ["GoldenPrompt", "TARGETS", "TextPart", "golden_trace", "precision_for", "write_bundle"]

TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
"""What a bundle can be written for. ONNX Runtime runs the graphs of every bundle."""

_MANIFEST = "manifest.json"
_PROMPT_CLASSES = "prompt_classes.safetensors"


@dataclass(frozen=True)
class GoldenPrompt:
    """What a golden trace is made of: B images of one prompt class.

    condition: what `Backbone.prefix` takes. seeds: one an image, or InputError.
    """

    condition: tuple[Tensor, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.seeds or any(len(tensor) != len(self.seeds) for tensor in self.condition):
            asked = [len(tensor) for tensor in self.condition]
            raise InputError(f"golden trace: {asked[0]} prompts and {len(self.seeds)} seeds; give one seed per prompt")


@dataclass(frozen=True)
class TextPart:
    """What a bundle of a text-conditional model has besides: its encoder, and what tells its prompt classes apart."""

    source: TextSource
    discriminants: Mapping[str, Discriminant] | None


def precision_for(wish: Literal["auto", "fp32", "fp16"], target: str) -> Literal["fp32", "fp16"]:
    """The precision of a bundle: what suits the target where the profile leaves it open.

    Raises:
        InputError: an unknown target.
    """
    if target not in TARGETS:
        raise InputError(f"target {target!r}: no bundle is written for it; valid: {', '.join(TARGETS)}")
    if wish != "auto":
        return wish
    return "fp32" if target == "onnxruntime" else "fp16"


def write_bundle(
    folder: Path,
    exporter: GraphExporter,
    plan: Plan,
    *,
    name: str,
    condition: Condition,
    golden: Mapping[str, GoldenPrompt],
    target: str = "onnxruntime",
    text: TextPart | None = None,
    load_options: Mapping[str, str | int] | None = None,
    documents: Mapping[str, str] | None = None,
    engine_options: EngineOptions | None = None,
    engine_cache: Path | None = None,
    external_data: bool | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Manifest:
    """Export, build and write everything that a runtime needs.

    The folder appears when it is complete. An interrupt or an error leaves what was there before, and nothing else.

    Args:
        folder: of the bundle. It may exist if it is empty or holds a bundle, which is then replaced.
        exporter: of the backbone; graphs that it has exported before are not exported again.
        plan: for this checkpoint.
        name: of the bundle, for people.
        condition: how pictures are asked for; its labels name prompt classes of the plan.
        golden: by prompt class, what the golden trace shows. Empty: no trace (too large a model).
        target: one of `TARGETS`.
        text: of a text-conditional model; its encoder's description completes `condition`.
        load_options: what the checkpoint was loaded with, besides its files.
        documents: texts to carry along by file name, like ``profile.toml`` and ``calibration.json``.
        engine_options, engine_cache: see `toprovar.exporter.engine`.
        external_data: weights in files beside the graphs; None decides by size.
        on_stage: called with a line of text before each part of the work.

    Returns: the manifest.

    Raises:
        InputError: a folder that is no bundle or cannot be written; precision or prompt classes that do not fit.
        FormatError: the plan is of a model of other sizes.
        TargetError: an engine cannot be built.
        ToprovarError: the disk is full.
    """
    backbone, say = exporter.backbone, on_stage or (lambda _: None)
    check_fit(plan, backbone.spec)
    precision = _check(backbone, plan, condition, golden, target)
    builder = open_builder(target) if target != "onnxruntime" else None  # before any work
    with _replacing_folder(folder) as place:
        trace: dict[str, np.ndarray[Any, Any]] = {}
        for prompt_class, prompt in golden.items():
            say(f"golden trace of {prompt_class}")
            arrays = golden_trace(backbone, plan, prompt_class, prompt)
            trace |= {f"{prompt_class}/{key}": array for key, array in arrays.items()}
        if trace:
            write_bytes(place / "golden.safetensors", save(trace))
        backbone.to("cpu")  # where graphs are traced and written from
        graphs = {}
        metadata = _metadata(backbone, plan, precision)
        for graph_name in GRAPHS:
            say(f"graph {graph_name}")
            graph = exporter.graph(graph_name, plan.roles, plan.restore)
            save_graph(graph, place / f"{graph_name}.onnx", metadata, external_data=external_data)
            graphs[graph_name] = graph
        say("constants")
        loops, constants = _constants(backbone, plan, graphs)
        write_bytes(place / "constants.safetensors", save(constants))
        if text is not None:
            say("text")
            condition = _write_text(place, text, condition, loops)
        save_plan(place / "plan.json", plan)
        for file, content in (documents or {}).items():
            write_text(place / file, content)

        infos = {
            graph_name: GraphInfo(file=f"{graph_name}.onnx", inputs=graph.inputs, outputs=graph.outputs)
            for graph_name, graph in graphs.items()
        }
        model = _model_info(backbone, plan)
        targets: dict[str, TargetInfo] = {"onnxruntime": TargetInfo()}
        if builder is not None:
            targets[target] = build_engines(
                builder,
                place,
                infos,
                loops,
                {key: tensor.shape for key, tensor in constants.items()},
                model,
                condition,
                engine_options or EngineOptions(),
                cache=engine_cache,
                on_engine=lambda graph_name, shapes: say(f"engine {graph_name}, {shapes} shapes"),
            )
        say("manifest")
        manifest = Manifest(
            schema=cast(Any, formats.SCHEMA),
            toprovar_version=__version__,
            contract_version=CONTRACT_VERSION,
            name=name,
            backbone=cast(Any, backbone.spec.backbone),
            precision=cast(Any, precision),
            model=model,
            condition=condition,
            sampling=_sampling(backbone),
            graphs=cast(Any, infos),
            schedules=loops,
            targets=cast(Any, targets),
            provenance=Provenance(
                checkpoint_sha256=plan.checkpoint_sha256,
                load_options=dict(load_options or {}),
                profile=plan.profile.name,
                profile_sha256=plan.profile_sha256,
                calibration_sha256=plan.calibration_sha256,
                plan_sha256=plan.sha256,
            ),
            files=_files(place),
        )
        write_text(place / _MANIFEST, pretty_json(manifest))
    return manifest


def _check(
    backbone: Backbone, plan: Plan, condition: Condition, golden: Mapping[str, GoldenPrompt], target: str
) -> Literal["float32", "float16", "bfloat16"]:
    """Everything that can be refused before work begins. Returns the precision."""
    if target not in TARGETS:
        raise InputError(f"target {target!r}: no bundle is written for it; valid: {', '.join(TARGETS)}")
    for kind, names in (("labels", {label.prompt_class for label in condition.labels}), ("golden trace", set(golden))):
        if unknown := sorted(names - set(plan.classes)):
            raise InputError(
                f"{kind}: prompt class {unknown[0]!r} is not in the plan, which has {', '.join(plan.classes)}; "
                "calibrate with the same prompt classes"
            )
    found = str(backbone.dtype).removeprefix("torch.")
    wanted = {"fp32": "float32", "fp16": "float16"}.get(plan.precision, found)
    if found != wanted:
        raise InputError(f"the plan asks for {wanted}, the model was loaded in {found}; load it in {wanted}")
    return cast(Literal["float32", "float16", "bfloat16"], found)


def _write_text(place: Path, text: TextPart, condition: Condition, loops: Mapping[str, Schedule]) -> Condition:
    """Encoder, tokenizer and prompt classes; the condition that names them."""
    encoder = write_encoder(
        text.source, place, text_width=condition.text_width or 0, maximum_tokens=condition.text_maximum_tokens or 0
    )
    update: dict[str, Any] = {"text_encoder": encoder}
    if text.discriminants and set(text.discriminants) == set(loops):
        known = [text.discriminants[name] for name in loops]
        weights, bias = np.array([one.weights for one in known], np.float32), np.array([one.bias for one in known])
        write_bytes(place / _PROMPT_CLASSES, save({"weights": weights, "bias": bias.astype(np.float32)}))
        update["prompt_classes"] = _PROMPT_CLASSES
    return condition.model_copy(update=update)


def _metadata(backbone: Backbone, plan: Plan, precision: str) -> dict[str, str]:
    values = {
        "version": __version__,
        "contract_version": str(CONTRACT_VERSION),
        "backbone": backbone.spec.backbone,
        "precision": precision,
        "checkpoint_sha256": plan.checkpoint_sha256,
        "plan_sha256": plan.sha256,
    }
    return {f"toprovar.{key}": value for key, value in values.items()}


def _model_info(backbone: Backbone, plan: Plan) -> ModelInfo:
    spec = backbone.spec
    return ModelInfo(
        depth=spec.depth,
        width=spec.width,
        heads=spec.heads,
        head_dim=spec.head_dim,
        logits=spec.vocab,
        roles=plan.roles,
        rows_per_image=cast(Literal[1, 2], backbone.branches),
        code_shape=(spec.latent_channels, *spec.latent_grid),
        image_size=spec.image_size,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
    )


def _sampling(backbone: Backbone) -> Sampling:
    given = backbone.sampling

    def number(value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        return tuple(map(float, value)) if isinstance(value, tuple) else float(value)

    return Sampling(
        guidance=number(given.guidance),
        temperature=number(given.temperature),
        top_k=given.top_k,
        top_p=float(given.top_p),
    )


def _files(place: Path) -> dict[str, FileInfo]:
    """Size and hash of every file, and each of them on the disk."""
    infos = {}
    for path in sorted(place.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            name = path.relative_to(place).as_posix()
            infos[name] = FileInfo(sha256=sha256_file(path), size_bytes=path.stat().st_size)
    return infos


# ---------------------------------------------------------------------------------------------------------------------
# Constants


def _constants(
    backbone: Backbone, plan: Plan, graphs: Mapping[str, Graph]
) -> tuple[dict[str, Schedule], dict[str, np.ndarray[Any, Any]]]:
    """The loop of every prompt class, and the tensors that its steps name; equal tensors are stored once."""
    inputs = {info.name for name in ("step", "advance") for info in graphs[name].inputs}
    stored: dict[str, np.ndarray[Any, Any]] = {}
    known: dict[str, str] = {}

    def store(step: ScaleStep, name: str, tensor: Tensor) -> str:
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        digest = sha256_bytes(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        if digest not in known:
            key, again = f"{name}.{step.scale}", 1
            while key in stored:  # the same input at the same scale, otherwise in another prompt class
                again += 1
                key = f"{name}.{step.scale}.{again}"
            stored[key], known[digest] = array, key
        return known[digest]

    loops = {}
    for prompt_class, loop in schedules(plan).items():
        captured: int | None = None
        steps = []
        for step in loop.steps:
            # Behind the last step of a loop the first scale stands in as the next.
            tensors = backbone.scale_constants(step.scale, 0 if step.last else step.scale + 1)
            rows, cols = torch.zeros(step.grid[0], 1), torch.zeros(step.grid[1], 1)
            if captured is not None:
                rows, cols = restore_constants(backbone.spec, step.scale, captured)
            tensors |= {Names.AREA_ROWS.value: rows, Names.AREA_COLS.value: cols}
            named = {key: store(step, key, tensor) for key, tensor in tensors.items() if key in inputs}
            steps.append(step.model_copy(update={"constants": named}))
            if step.capture_span_delta:
                captured = step.scale
        loops[prompt_class] = Schedule(steps=tuple(steps))
    return loops, stored


# ---------------------------------------------------------------------------------------------------------------------
# The golden trace


_ATTEMPTS = 8
_CLEAR_ENTROPY_NATS = 3e-6
_CLEAR_LOGITS = 2e-6
_NUDGES = 2
"""Several times what PyTorch and ONNX Runtime differ by on average in fp32: the entropy by 1e-6 at scores below ten, a
logit by 1.3e-7 of the largest (demo checkpoint, last scale). A larger margin would pass over most seeds. One nudge of random
signs misses a close pair in every second case, and did: a token whose best two were 1.3e-4 apart, with logits up to 52."""


class _Unclear(Exception):
    """A decision of this trace is too close to call."""


def golden_trace(
    backbone: Backbone, plan: Plan, prompt_class: str, prompt: GoldenPrompt
) -> dict[str, np.ndarray[Any, Any]]:
    """What PyTorch makes of a prompt under the plan, from the noise of its seeds: what every runtime must make again.

    Sampling and selection are discontinuous: where two tokens are within rounding of each other, two correct runtimes
    may choose differently, and everything behind that differs. Such a trace proves nothing, so seeds with a decision
    that is too close are passed over for the next ones, `_ATTEMPTS` times at most (in half precision none is clear).

    Returns: the condition by the names of the prefix graph's inputs, ``seeds``, ``tokens_{s}`` of every scale that
    runs, ``codes`` and ``image``.
    """
    images = len(prompt.seeds)
    attempts = [[seed + i * images for seed in prompt.seeds] for i in range(_ATTEMPTS)]
    for seeds in attempts if backbone.dtype == torch.float32 else ():
        with contextlib.suppress(_Unclear):
            trace = _generate(backbone, plan, prompt_class, prompt.condition, seeds, clear=True)
            break
    else:
        seeds = attempts[0]
        trace = _generate(backbone, plan, prompt_class, prompt.condition, seeds, clear=False)
    assert trace.image is not None
    names = (Names.LABELS,) if len(prompt.condition) == 1 else (Names.TEXT_FEATURES, Names.TEXT_LENGTHS)
    tensors = {name.value: tensor for name, tensor in zip(names, prompt.condition, strict=True)}
    tensors |= {f"tokens_{scale}": tokens for scale, tokens in zip(trace.scales, trace.tokens, strict=True)}
    tensors |= {"codes": trace.codes[-1], "image": trace.image}
    arrays = {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in tensors.items()}
    return arrays | {"seeds": np.array(seeds, dtype=np.int64)}


def _generate(
    backbone: Backbone, plan: Plan, prompt_class: str, condition: Sequence[Tensor], seeds: list[int], *, clear: bool
) -> Trace:
    """Raises _Unclear, where asked for clear decisions, at the first scale that has one that is not."""
    drawn: dict[int, Tensor] = {}
    pruned = pruning(plan, prompt_class)

    def noise(scale: int, shape: tuple[int, ...]) -> Tensor:
        tokens, _, logits = shape
        drawn[scale] = torch.from_numpy(scale_noise(seeds, scale, tokens, logits)).to(backbone.device)
        return drawn[scale]

    def check(scale: int, trace: Trace) -> None:
        for score in trace.scores.pop():
            ordered, keep = score[: len(seeds)].sort(dim=1).values, pruned.keep[scale]
            gaps = ordered[:, keep : keep + 1] - ordered[:, keep - 1 : keep]  # empty where all tokens are kept
            if (gaps < _CLEAR_ENTROPY_NATS).any():
                raise _Unclear
        logits, tokens, constants = trace.logits.pop(), trace.tokens[-1], backbone.scale_constants(scale)
        generator = torch.Generator().manual_seed(scale)
        for _ in range(_NUDGES):
            signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
            nudge = signs * (_CLEAR_LOGITS * logits.abs().max())
            for nudged in (logits + nudge, logits - nudge):
                if not torch.equal(backbone.sample(nudged, drawn[scale], constants), tokens):
                    raise _Unclear

    with torch.no_grad():
        prefix = backbone.prefix(*(tensor.to(backbone.device) for tensor in condition))
        return generate(
            backbone,
            prefix,
            noise=noise,
            pruning=pruned,
            record=("scores", "logits") if clear else (),
            after_scale=check if clear else None,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place when the block ends well, and is gone in any case."""
    _require_bundle_or_nothing(folder)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        old = temporary.with_suffix(".old")
        try:
            if folder.is_dir():
                os.replace(folder, old)
            os.replace(temporary, folder)
        except BaseException:
            if old.is_dir() and not folder.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_bundle_or_nothing(folder: Path) -> None:
    """Raises InputError where a bundle cannot go without destroying something else."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise InputError(f"{folder}: is a file or a link; name a folder for the bundle that does not exist yet")
    if not any(folder.iterdir()):
        return
    try:
        schema = json.loads((folder / _MANIFEST).read_bytes()).get("schema")
    except (OSError, ValueError, AttributeError):
        schema = None
    if not str(schema).startswith("toprovar.bundle/"):
        raise InputError(f"{folder}: exists and is no bundle, so it is left alone; name another folder, or remove it")
