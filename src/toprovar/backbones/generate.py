"""The loop over scales in PyTorch: what calibration watches, and what every runtime of a bundle must equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from toprovar.backbones.base import Backbone, EntropyMode, Prefix, Spec, restore_constants
from toprovar.backbones.step import Step
from toprovar.errors import InputError

__all__ = ["RECORDS", "Noise", "Pruning", "Trace", "generate"]

Noise = Callable[[int, tuple[int, ...]], Tensor] | Sequence[Tensor]
"""Uniform noise: a function of (scale, shape as `Backbone.noise_shape` gives it), or one tensor a scale run."""

RECORDS = ("codes", "hidden", "inputs", "kept", "logits", "scores", "span_deltas")
"""What `generate(record=...)` can be asked to keep."""


@dataclass(frozen=True)
class Pruning:
    """How to run the scales: what a plan decides, as `generate` takes it.

    roles: "g" or "d" a layer. keep: K of every scale of the schedule, N where it is dense. cache_scale: the dense scale
    whose span changes pruned tokens get; None with `restore="identity"` and where nothing is pruned.
    scales_run: the scales to run, ascending; None for all.
    """

    roles: str
    keep: tuple[int, ...]
    cache_scale: int | None = None
    restore: Literal["cache", "identity"] = "cache"
    scales_run: tuple[int, ...] | None = None

    @classmethod
    def none(cls, spec: Spec) -> Pruning:
        """The dense model, all scales."""
        return cls("g" * spec.depth, spec.tokens)

    def check(self, spec: Spec) -> None:
        """Raises InputError where this does not fit a backbone of these sizes. `Step` checks the roles."""
        if len(self.keep) != spec.scales:
            raise InputError(f"pruning keeps tokens at {len(self.keep)} scales: the schedule has {spec.scales}")
        for scale, (kept, tokens) in enumerate(zip(self.keep, spec.tokens, strict=True)):
            if not 1 <= kept <= tokens:
                raise InputError(f"pruning keeps {kept} tokens at scale {scale}: K is 1 to {tokens} there")
        run = tuple(range(spec.scales)) if self.scales_run is None else self.scales_run
        if not run or run[0] != 0 or list(run) != sorted(set(run)) or run[-1] >= spec.scales:
            raise InputError(f"scales_run is {run}: give ascending scales from 0, below {spec.scales}")
        pruned = [s for s in run if self.keep[s] < spec.tokens[s]]
        if pruned and "d" in self.roles and self.restore == "cache":
            cache = self.cache_scale
            if cache is None or cache not in run or cache >= pruned[0]:
                raise InputError(f"cache_scale is {cache}: give a scale run before the first pruned one, {pruned[0]}")


@dataclass
class Trace:
    """What a run leaves. A list has one entry a scale run, and is empty if it was not asked for.

    tokens `[B, N]` or `[B, N, bits]` int32. codes, accumulated, `[B, latent_channels, h, w]` (the final ones always).
    image `[B, 3, height, width]` in [0, 1]. logits `[N, R, V]` before guidance. inputs `[N, R, C]`. hidden, a layer,
    `[n, R, C]`. entropy, a layer, `[R, n]` (`[R, H, n]` with entropy="head") in nats. kept, a span, `[B, K]`.
    scores, a span, the entropy that chose its tokens, `[R, N]`. span_deltas, a span, `[K, R, C]`.
    """

    scales: list[int]
    image: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    hidden: list[list[Tensor]] = field(default_factory=list)
    entropy: list[list[Tensor]] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    scores: list[list[Tensor]] = field(default_factory=list)
    span_deltas: list[list[Tensor]] = field(default_factory=list)


class _Cache:
    """Keys and values of all layers, sequence-first, allocated once; a scale writes behind the scales before it."""

    def __init__(self, backbone: Backbone, rows: int, capacity: Sequence[int]):
        spec = backbone.spec
        self.length = [0] * spec.depth
        self.store = [
            torch.empty(capacity[i // 2], rows, spec.heads, spec.head_dim, dtype=backbone.dtype, device=backbone.device)
            for i in range(2 * spec.depth)
        ]

    def past(self) -> list[Tensor]:
        """`k0, v0, k1, v1, ...`, each a view `[P, R, H, D]`."""
        return [store.narrow(0, 0, self.length[i // 2]) for i, store in enumerate(self.store)]

    def append(self, new_kv: Sequence[Tensor]) -> None:
        for i, new in enumerate(new_kv):
            self.store[i].narrow(0, self.length[i // 2], new.shape[0]).copy_(new)
        for layer in range(len(self.length)):
            self.length[layer] += new_kv[2 * layer].shape[0]


@torch.no_grad()
def generate(
    backbone: Backbone,
    prefix: Prefix,
    *,
    noise: Noise | None = None,
    tokens: Sequence[Tensor] | None = None,
    mixture: Callable[[int, Tensor], Tensor] | None = None,
    pruning: Pruning | None = None,
    entropy: EntropyMode = "none",
    record: Collection[str] = (),
    decode: bool = True,
    after_scale: Callable[[int, Trace], None] | None = None,
) -> Trace:
    """Generates pictures, one scale after another.

    Args:
        backbone: the model; `backbone.sampling` says how tokens are drawn.
        prefix: `backbone.prefix(...)` of the condition.
        noise: uniform noise; None takes the largest logit.
        tokens: teacher forcing: the tokens of every scale run, `[B, N]` or `[B, N, bits]`; nothing is drawn.
        mixture: what to add up instead of the codes of the tokens drawn: a function of (scale, logits `[N, R, V]`) that
            returns vectors `[B, N, latent_channels]`; `VAR.mixed_codes` is the original's `more_smooth`.
        pruning: roles, kept tokens and scales run; None for the dense model.
        entropy: "mean" or "head" records every layer's entropy.
        record: the lists of the trace to fill besides tokens and entropy, out of `RECORDS`.
        decode: False leaves `image` None.
        after_scale: called with (scale, trace) after each scale, for progress.

    Raises:
        InputError: a pruning that does not fit the backbone, tokens or noise of another shape, an unknown record.
    """
    spec = backbone.spec
    pruning = Pruning.none(spec) if pruning is None else pruning
    step = Step(backbone, pruning.roles, pruning.restore)
    pruning.check(spec)
    if unknown := set(record) - set(RECORDS):
        raise InputError(f"generate cannot record {sorted(unknown)}: it records {', '.join(RECORDS)}")
    run = list(range(spec.scales)) if pruning.scales_run is None else list(pruning.scales_run)
    for name, given in (("tokens", tokens), ("noise", noise)):
        if isinstance(given, Sequence) and len(given) != len(run):
            raise InputError(f"{name} of {len(given)} scales were given, {len(run)} are run: give one tensor a scale")

    x, rows = prefix.x0, prefix.x0.shape[1]
    images = rows // backbone.branches
    stored = {"g": sum(spec.tokens[s] for s in run[:-1]), "d": sum(pruning.keep[s] for s in run[:-1])}
    cache = _Cache(backbone, rows, [stored[role] for role in pruning.roles])
    codes = backbone.initial_codes(images)
    # Up to the cached scale every token is kept and the cache is not used: one cell of zeros stands for it.
    no_cache = [x.new_zeros(1, rows, spec.width) for _ in step.spans]
    span_cache = no_cache
    trace = Trace(run)

    for index, scale in enumerate(run):
        following = run[index + 1] if index + 1 < len(run) else None
        constants = backbone.scale_constants(scale, following)
        keep_slots = area_rows = area_cols = None
        if step.spans:
            keep_slots = torch.zeros(pruning.keep[scale], dtype=torch.int32, device=x.device)
            height, width = spec.grids[scale]
            if span_cache is no_cache or pruning.cache_scale is None:
                area_rows, area_cols = x.new_zeros(height, 1), x.new_zeros(width, 1)
            else:
                area_rows, area_cols = (m.to(x.device) for m in restore_constants(spec, scale, pruning.cache_scale))
        output = step.run(
            x,
            prefix.context,
            constants.get("rope"),
            keep_slots,
            area_rows,
            area_cols,
            cache.past(),
            span_cache,
            entropy=entropy,
            keep_hidden="hidden" in record,
        )
        if scale == pruning.cache_scale and pruning.restore == "cache":
            span_cache = output.span_deltas
        if following is not None:
            cache.append(output.new_kv)

        if tokens is not None:
            drawn = tokens[index].to(x.device, torch.int32)
            if drawn.shape[:2] != (images, spec.tokens[scale]):
                raise InputError(
                    f"tokens of scale {scale} are {list(drawn.shape)}: expected [{images}, {spec.tokens[scale]}, ...]"
                )
        else:
            uniform = None
            if noise is not None:
                shape = backbone.noise_shape(scale, images)
                uniform = noise(scale, shape) if callable(noise) else noise[index]
                if uniform.shape != shape:
                    raise InputError(f"noise of scale {scale} is {list(uniform.shape)}: expected {list(shape)}")
                uniform = uniform.to(x.device, torch.float32)
            drawn = backbone.sample(output.logits, uniform, constants)
        if mixture is None:
            codes = backbone.accumulate(drawn, codes, constants)
        else:
            codes = backbone.accumulate_vectors(mixture(scale, output.logits), codes, constants)

        trace.tokens.append(drawn)
        if entropy != "none":
            trace.entropy.append([layer for layer in output.entropy if layer is not None])
        if "inputs" in record:
            trace.inputs.append(x)
        if "codes" in record:
            trace.codes.append(codes)
        if "scores" in record:
            chose = [output.entropy[span.start - 1] for span in step.spans]
            trace.scores.append([score if score.dim() == 2 else score.mean(1) for score in chose if score is not None])
        for name in ("logits", "hidden", "kept", "span_deltas"):
            if name in record:
                getattr(trace, name).append(getattr(output, name))
        del output  # its keys and values are in the cache, and the next scale needs the memory
        if after_scale is not None:
            after_scale(scale, trace)
        if following is not None:
            x = backbone.next_input(codes, constants)
    if not trace.codes:
        trace.codes.append(codes)
    if decode:
        trace.image = backbone.decode(codes)
    return trace
