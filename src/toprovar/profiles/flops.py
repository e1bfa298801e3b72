"""FLOPs of a generation, dense or pruned. One multiply-add is 2 FLOPs; per image, all CFG rows counted.

Counted are the matrix products of the transformer: linear layers, attention (scores and weighted sum), embedding and
head. Not counted is what is linear in the tokens without a matrix (norms, softmax, selection, restore), nor text
encoder and decoder. The formulas equal torch's FlopCounterMode on the original Infinity blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from toprovar.errors import InputError
from toprovar.profiles.files import Strict

__all__ = [
    "Flops",
    "ModelShape",
    "PlanFlops",
    "Saving",
    "conditioning_flops",
    "dense_flops",
    "head_flops",
    "layer_flops",
    "plan_flops",
    "saving",
]


class ModelShape(Strict):
    """The sizes of a transformer, as far as plans and FLOPs depend on them."""

    backbone: Literal["var", "infinity"]
    depth: int = Field(ge=1)
    """Layers."""
    width: int = Field(ge=1)
    """C."""
    ffn_width: int = Field(ge=1)
    """Hidden width of the two-matrix feed-forward."""
    logits: int = Field(ge=1)
    """V, logits per token."""
    code_channels: int = Field(ge=1)
    """Channels of a code as the word embedding takes it."""
    grids: tuple[tuple[int, int], ...] = Field(min_length=1)
    """(h, w) of every scale, dropped ones included."""
    text_tokens: int = Field(default=0, ge=0)
    """Text tokens per row that cross-attention sees; 0: the model has no cross-attention. For Infinity it is the
    prompt's length, so a typical number (64) stands here, and only FLOPs depend on it."""
    shared_conditioning: bool = False
    """AdaLN products: one matrix for all layers instead of one per layer."""

    @model_validator(mode="after")
    def _check(self) -> ModelShape:
        if any(h < 1 or w < 1 for h, w in self.grids):
            raise ValueError(f"grids: found {[list(grid) for grid in self.grids]}, expected positive sizes")
        if any(a >= b for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise ValueError(
                f"grids: found {[list(grid) for grid in self.grids]}, expected each larger than the one before"
            )
        return self

    @property
    def tokens(self) -> tuple[int, ...]:
        """N of every scale."""
        return tuple(h * w for h, w in self.grids)

    def first_scale(self, side: int) -> int | None:
        """The first scale with at least side**2 tokens, so that grids that are not square compare too."""
        return next((s for s, tokens in enumerate(self.tokens) if tokens >= side * side), None)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one scale."""

    linear: int = 0
    self_attention: int = 0
    cross_attention: int = 0
    head: int = 0
    """Word embedding and logits."""

    @property
    def total(self) -> int:
        return self.linear + self.self_attention + self.cross_attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear,
            self.self_attention + other.self_attention,
            self.cross_attention + other.cross_attention,
            self.head + other.head,
        )


@dataclass(frozen=True)
class PlanFlops:
    """FLOPs of every scale that runs, and of the conditioning, which is computed once per image."""

    scales: tuple[Flops, ...]
    conditioning: int

    @property
    def total(self) -> int:
        return self.conditioning + sum(scale.total for scale in self.scales)


@dataclass(frozen=True)
class Saving:
    """Where a plan's saving comes from, in FLOPs: `plan == dense - dropped_scales - detail_tokens`."""

    dense: int
    dropped_scales: int
    """What the dense model spends on the scales that are not run."""
    detail_tokens: int
    """What the detail layers save at the scales that are run: fewer queries, and fewer cached keys."""
    plan: int


def layer_flops(model: ModelShape, tokens: int, keys: int) -> Flops:
    """One row through one layer: `tokens` queries on `keys` keys."""
    width = model.width
    per_token = 8 * width * width + 4 * width * model.ffn_width  # q, k, v, projection; two matrices of the FFN
    if model.text_tokens:
        per_token += 4 * width * width  # q and projection of the cross-attention; its K and V are conditioning
    return Flops(
        linear=tokens * per_token,
        self_attention=4 * tokens * keys * width,
        cross_attention=4 * tokens * model.text_tokens * width,
    )


def _scaled(flops: Flops, by: int) -> Flops:
    return Flops(flops.linear * by, flops.self_attention * by, flops.cross_attention * by, flops.head * by)


def head_flops(model: ModelShape, tokens: int) -> Flops:
    """One row: word embedding and logits of `tokens` tokens."""
    return Flops(head=tokens * 2 * model.width * (model.logits + model.code_channels))


def conditioning_flops(model: ModelShape) -> int:
    """One row: AdaLN of all layers and of the head, and K and V of the cross-attention."""
    width = model.width
    adaln = 12 * width * width * (1 if model.shared_conditioning else model.depth) + 4 * width * width
    return adaln + model.depth * model.text_tokens * 4 * width * width


def plan_flops(model: ModelShape, roles: str, keep: Sequence[int], rows: int = 2) -> PlanFlops:
    """FLOPs of one image.

    Args:
        roles: "g" or "d" per layer.
        keep: K of every scale that is run, in order; N where it is dense. Scales behind the last one are dropped.
        rows: transformer rows per image, 2 with classifier-free guidance.

    Raises:
        InputError: roles or keep do not fit the model.
    """
    if len(roles) != model.depth or set(roles) - {"g", "d"}:
        raise InputError(f"roles {roles!r} do not fit: expected one letter, g or d, for each of {model.depth} layers")
    if not 1 <= len(keep) <= len(model.grids):
        raise InputError(f"keep has {len(keep)} scales: the schedule has {len(model.grids)}")
    detail_layers = roles.count("d")
    past_global = past_detail = 0
    scales = []
    for tokens, kept in zip(model.tokens, keep, strict=False):
        flops = _scaled(layer_flops(model, tokens, past_global + tokens), model.depth - detail_layers)
        flops += _scaled(layer_flops(model, kept, past_detail + kept), detail_layers)
        flops += head_flops(model, tokens)
        scales.append(_scaled(flops, rows))
        past_global, past_detail = past_global + tokens, past_detail + kept
    return PlanFlops(tuple(scales), rows * conditioning_flops(model))


def dense_flops(model: ModelShape, rows: int = 2) -> PlanFlops:
    """FLOPs of one image without any pruning, all scales run."""
    return plan_flops(model, "g" * model.depth, model.tokens, rows)


def saving(model: ModelShape, roles: str, keep: Sequence[int], rows: int = 2) -> Saving:
    """Splits the saving of a plan into dropped scales and everything else; arguments as `plan_flops`."""
    dense, plan = dense_flops(model, rows), plan_flops(model, roles, keep, rows)
    dropped = sum(scale.total for scale in dense.scales[len(keep) :])
    return Saving(dense.total, dropped, dense.total - dropped - plan.total, plan.total)
