"""The manifest of a bundle: everything a runtime needs to know, and nothing about the model's code.

A bundle is a folder::

    manifest.json             this file
    plan.json                 what was decided, with the profile in it
    calibration.json          what was measured, where the plan needed it
    prefix.onnx step.onnx advance.onnx decoder.onnx (+ *.data for weights above 2 GB)
    constants.safetensors     small tensors of each scale (resampling matrices, positions, guidance, ...)
    golden.safetensors        a golden trace: noise seeds, tokens per scale, codes, image
    text_encoder.onnx tokenizer.json    of a text model, where it was exported with its encoder
    prompt_classes.safetensors          of a text model with several prompt classes
    engines/<target>/...      engines, where a target needs them

The runtime loop is dumb on purpose. For every scale it resolves each graph input *by name*:

1. an output of ``prefix`` of the same name (the conditioning, computed once per image),
2. a tensor of ``constants.safetensors`` named by ``ScaleStep.constants[input]``,
3. one of the names in `LoopNames`, which the loop owns (tokens, caches, noise, codes).

What the loop relies on:

- ``prefix`` takes `LoopNames.LABELS` (or the text inputs) and gives ``x`` of scale 0; its other outputs are context. Of
  the symbolic dimensions of its outputs the loop knows B, R, N (of scale 0), T (text length).
- ``span_cache_i`` has M = hc * wc rows, where ``area_rows`` [h, hc] and ``area_cols`` [w, wc] are constants of the
  step. Behind the step that captures, hc x wc is that step's grid. Before and at it the cache is zeros, and 1 x 1 will
  do: every token is kept there, so nothing is restored.
- A graph has one set of inputs: at the `last` step the constants of ``next_x`` lead to the first scale again, and the
  loop throws the result away.
- `ScaleStep.constants` is for inputs of ``step`` and of ``advance`` alike; their names do not clash.

``text_encoder.onnx`` takes `LoopNames.TOKEN_IDS` and `LoopNames.TEXT_LENGTHS` and gives `LoopNames.TEXT_FEATURES`, zero in
the padding; ``tokenizer.json`` is what `toprovar.profiles.tokenizer` reads. ``prompt_classes.safetensors`` holds ``weights``
[classes, text_width] and ``bias`` [classes] in the order of the schedules: see `toprovar.profiles.prompts.classify`.

``golden.safetensors`` holds for every prompt class ``c``, with B images each: ``c/labels`` [B] int32 (text:
``c/text_features`` [B, T, text_width], ``c/text_lengths`` [B] int32), ``c/seeds`` [B] int64, ``c/tokens_{s}`` for every
scale s that runs, ``c/codes`` and ``c/image`` [B, 3, height, width] fp32.

Names in a manifest never leave the bundle's folder; every file is hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from toprovar.profiles.files import sha256_files, sha256_json

__all__ = [
    "SCHEMA",
    "Condition",
    "FileInfo",
    "GraphInfo",
    "Label",
    "LoopNames",
    "Manifest",
    "ModelInfo",
    "Provenance",
    "Sampling",
    "ScaleStep",
    "Schedule",
    "TargetInfo",
    "TensorInfo",
    "TextEncoderInfo",
    "sha256_checkpoint",
    "stage_name",
]

SCHEMA = "toprovar.bundle/1"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _inside_bundle(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"{name!r} points outside the bundle's folder; a name is relative and has no '..'")
    return name


BundlePath = Annotated[str, AfterValidator(_inside_bundle)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LoopNames(str, Enum):
    """Names of graph inputs and outputs that the runtime loop itself supplies or consumes.

    ``{i}`` is a layer for the cache and a span (a run of detail layers) for the restore cache.
    """

    LABELS = "labels"  # [B] int32 class labels, input of prefix
    TOKEN_IDS = "token_ids"  # [B, T] int64, input of the text encoder
    TEXT_FEATURES = "text_features"  # [B, T, text_width], input of prefix
    TEXT_LENGTHS = "text_lengths"  # [B] int32, how many of the T features are the prompt's
    X = "x"  # [N, R, C] step input; output of prefix (scale 0) and of advance as `next_x`
    NEXT_X = "next_x"  # [N', R, C]
    LOGITS = "logits"  # [N, R, V]
    NOISE = "noise"  # [N, B, V] uniform in (0, 1), fp32
    CODES = "codes"  # [B, Cv, h, w] accumulated codes, input of advance and of decoder
    CODES_OUT = "codes_out"  # [B, Cv, h, w]
    TOKENS = "tokens"  # [B, N] (VQ) or [B, N, bits] int32
    IMAGE = "image"  # [B, 3, height_px, width_px] in [0, 1], RGB
    KEEP_SLOTS = "keep_slots"  # [K] int32, only its length matters
    PAST_K = "past_k_{i}"  # [P, R, H, D]
    PAST_V = "past_v_{i}"
    NEW_K = "new_k_{i}"  # [N or K, R, H, D]
    NEW_V = "new_v_{i}"
    AREA_ROWS = "area_rows"  # [h, hc], constant; resizes a span cache to the scale's grid
    AREA_COLS = "area_cols"  # [w, wc], constant
    SPAN_CACHE = "span_cache_{i}"  # [M, R, C] branch sum of a span at the cached dense scale
    SPAN_DELTA = "span_delta_{i}"  # [K, R, C]


class FileInfo(_Model):
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class TensorInfo(_Model):
    """A graph input or output. Symbolic dimensions are strings: N, R, B, K, P_global, P_detail, M, ..."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int32", "int64", "bool"]
    shape: tuple[int | str, ...]


class GraphInfo(_Model):
    file: BundlePath
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class TargetInfo(_Model):
    """What a target runs. `onnxruntime` runs the graphs themselves and lists no engines."""

    engines: dict[str, BundlePath] = Field(default_factory=dict)  # by `stage_name`
    version: str | None = None  # of the builder
    gpu: str | None = None
    driver: str | None = None
    compute_capability: str | None = None
    batch: int | None = None  # engines with static shapes are built for one batch size
    cache_key: Sha256 | None = None


class ModelInfo(_Model):
    depth: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    logits: int = Field(ge=2)  # V
    roles: Annotated[str, Field(pattern=r"^g[gd]*$")]  # one letter per layer
    rows_per_image: Literal[1, 2] = 2  # 2: classifier-free guidance, conditional rows first
    code_shape: tuple[int, int, int]  # [Cv, h, w] of `codes`
    image_size: tuple[int, int]  # [height, width] in pixels
    parameters: int = Field(ge=0)

    @property
    def spans(self) -> tuple[tuple[int, ...], ...]:
        """Maximal runs of detail layers, as layer indices."""
        runs: list[list[int]] = []
        for layer, role in enumerate(self.roles):
            if role == "d":
                if runs and runs[-1][-1] == layer - 1:
                    runs[-1].append(layer)
                else:
                    runs.append([layer])
        return tuple(tuple(run) for run in runs)


class Label(_Model):
    name: str
    prompt_class: str


class TextEncoderInfo(_Model):
    """The text encoder in a bundle, which ONNX Runtime runs on any machine."""

    name: str  # for people
    graph: BundlePath
    tokenizer: BundlePath


class Condition(_Model):
    """How a picture is asked for: a class label, or text features [B, T, text_width] with lengths.

    A bundle of a text model takes prompts where it has a `text_encoder`, and features in any case.
    """

    kind: Literal["label", "text"]
    labels: tuple[Label, ...] = ()
    text_width: int | None = None
    text_maximum_tokens: int | None = None
    text_encoder: TextEncoderInfo | None = None
    prompt_classes: BundlePath | None = None  # what tells the prompt class of a text; None: there is one class
    examples: tuple[Label, ...] = ()  # the prompts of the golden trace, in its order


class Sampling(_Model):
    """Baked into the advance graph and the constants at export."""

    guidance: float | tuple[float, ...]
    top_k: int = Field(ge=0)
    top_p: float = Field(ge=0, le=1)
    temperature: float | tuple[float, ...] = 1.0


class ScaleStep(_Model):
    """One turn of the loop: all sizes are known when the engine is built."""

    scale: int = Field(ge=0)
    grid: tuple[int, int]
    tokens: int = Field(ge=1)  # N = h * w
    keep: int = Field(ge=1)  # K; N where the scale is dense
    past_global: int = Field(ge=0)  # P of global layers, in tokens
    past_detail: int = Field(ge=0)  # P of detail layers
    capture_span_delta: bool = False  # this dense scale's span deltas fill the restore cache
    last: bool = False  # its advance yields no next input
    constants: dict[str, str] = Field(default_factory=dict)  # graph input -> tensor of constants.safetensors

    @model_validator(mode="after")
    def _check(self) -> ScaleStep:
        if self.tokens != self.grid[0] * self.grid[1]:
            raise ValueError(f"scale {self.scale}: tokens {self.tokens} is not {self.grid[0]} x {self.grid[1]}")
        if self.keep > self.tokens:
            raise ValueError(f"scale {self.scale}: keeps {self.keep} of {self.tokens} tokens")
        return self


class Schedule(_Model):
    """The loop of one prompt class. Scales that the plan drops are not listed."""

    steps: tuple[ScaleStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        past_global, past_detail = 0, 0
        for position, step in enumerate(self.steps):
            name, final = f"scale {step.scale}", position == len(self.steps) - 1
            if (step.past_global, step.past_detail) != (past_global, past_detail):
                raise ValueError(
                    f"{name}: past is {step.past_global} and {step.past_detail} tokens, "
                    f"the scales before it leave {past_global} and {past_detail}"
                )
            if position and step.scale <= self.steps[position - 1].scale:
                raise ValueError(f"{name}: comes after scale {self.steps[position - 1].scale}; scales ascend")
            if step.last != final:
                raise ValueError(f"{name}: last is {step.last}; it is true for the final step and no other")
            if step.capture_span_delta and step.keep != step.tokens:
                raise ValueError(f"{name}: captures span deltas but keeps {step.keep} of {step.tokens} tokens")
            past_global, past_detail = past_global + step.tokens, past_detail + step.keep
        if sum(step.capture_span_delta for step in self.steps) > 1:
            raise ValueError("more than one step captures span deltas")
        return self


def stage_name(graph: str, stage: int) -> str:
    """What an engine is called in `TargetInfo`: its graph, and of a graph that was cut ``step``, ``step.1``, ``step.2``, ...,
    which run one behind the other."""
    return graph if stage == 0 else f"{graph}.{stage}"


def sha256_checkpoint(*parts: Sequence[Path]) -> str:
    """What a calibration, a plan and a bundle call the hash of their checkpoint: of the files of the transformer and of
    the tokenizer, in this order, each of which may be in shards."""
    return sha256_json([sha256_files(part) for part in parts])


class Provenance(_Model):
    checkpoint_sha256: Sha256
    load_options: dict[str, str | int] = Field(default_factory=dict)  # what `backbones.load` took besides the files
    profile: str
    profile_sha256: Sha256
    calibration_sha256: Sha256 | None  # None: a plan that prunes nothing needs none
    plan_sha256: Sha256


class Manifest(_Model):
    schema_version: Literal["toprovar.bundle/1"] = Field(alias="schema")
    toprovar_version: str
    contract_version: int
    name: str
    backbone: Literal["var", "infinity", "hart", "star"]
    precision: Literal["float32", "float16", "bfloat16"]
    model: ModelInfo
    condition: Condition
    sampling: Sampling
    graphs: dict[Literal["prefix", "step", "advance", "decoder"], GraphInfo]
    schedules: dict[str, Schedule] = Field(min_length=1)  # prompt class -> loop
    targets: dict[Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "torch"], TargetInfo]
    provenance: Provenance
    files: dict[BundlePath, FileInfo]  # every file but manifest.json

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        named = {graph.file for graph in self.graphs.values()}
        named |= {engine for target in self.targets.values() for engine in target.engines.values()}
        if self.condition.prompt_classes is not None:
            named.add(self.condition.prompt_classes)
        if self.condition.text_encoder is not None:
            named |= {self.condition.text_encoder.graph, self.condition.text_encoder.tokenizer}
        missing = sorted(named - set(self.files))
        if missing:
            raise ValueError(f"names files that it does not hash: {', '.join(missing)}")
        for label in (*self.condition.labels, *self.condition.examples):
            if label.prompt_class not in self.schedules:
                raise ValueError(
                    f"label {label.name!r} is of prompt class {label.prompt_class!r}, which has no schedule"
                )
        return self
