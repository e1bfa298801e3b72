"""One scale of any backbone, dense or pruned: the module behind `step.onnx`.

Each layer is *global* ("g": all N tokens) or *detail* ("d": the K kept tokens). A maximal run of detail layers is a
*span*. Where a span begins, the entropy of the global layer before it (conditional rows, mean over heads) selects the K
tokens with the least; x is gathered once, the span runs on the kept rows, and x is restored once where it ends. A
pruned token then gets what the span added to it at the cached dense scale, resized by area. That equals restoring
every residual branch of the span by itself, because the resize is linear and the kept set does not change inside a
span; `tests/backbones/test_step.py` proves it against the slow form. ToProVAR leaves the restore open
(reference: FastVAR's cached branch outputs); `restore="identity"` adds nothing to pruned tokens.
"""

from __future__ import annotations

from itertools import groupby
from typing import Literal, NamedTuple

from torch import Tensor, nn

from toprovar.backbones.base import Backbone, Context, EntropyMode
from toprovar.errors import InputError
from toprovar.kernels import gather_tokens, restore_tokens, scatter_tokens, select_tokens

__all__ = ["Segment", "Step", "StepOutput"]


class Segment(NamedTuple):
    """Consecutive layers of one role: `range(start, stop)`."""

    role: str
    start: int
    stop: int


class StepOutput(NamedTuple):
    """Everything a step computes. `forward` gives the first three.

    n is N in a global layer and K in a detail layer. logits `[N, R, V]` fp32; new_kv `k0, v0, k1, v1, ...`, each
    `[n, R, H, D]`; span_deltas, one `[K, R, C]` fp32 a span (none with `restore="identity"`); entropy, per layer
    `[R, n]` or `[R, H, n]` or None; kept, one `[B, K]` int32 a span; hidden, the output of each layer `[n, R, C]` fp32, if
    asked for.
    """

    logits: Tensor
    new_kv: list[Tensor]
    span_deltas: list[Tensor]
    entropy: list[Tensor | None]
    kept: list[Tensor]
    hidden: list[Tensor]


class Step(nn.Module):
    """One scale through all layers of `backbone`.

    Args:
        backbone: the model; its blocks are shared, not copied.
        roles: "g" or "d" a layer; the first is "g". All "g" is the dense graph, with no selection in it.
        restore: "cache" or "identity": what a pruned token gets from a span.

    Raises:
        InputError: roles of another length, an unknown role or restore rule, a first layer that is not global.
    """

    def __init__(self, backbone: Backbone, roles: str | None = None, restore: Literal["cache", "identity"] = "cache"):
        super().__init__()
        depth = backbone.spec.depth
        roles = "g" * depth if roles is None else roles
        if len(roles) != depth:
            raise InputError(f"roles '{roles}' name {len(roles)} layers, the backbone has {depth}: one letter a layer")
        if unknown := set(roles) - {"g", "d"}:
            raise InputError(f"roles '{roles}' hold {sorted(unknown)}: a layer is 'g' (global) or 'd' (detail)")
        if roles[0] != "g":
            raise InputError(f"roles '{roles}' begin with a detail layer: the first must be 'g', it selects the tokens")
        if restore not in ("cache", "identity"):
            raise InputError(f"restore is '{restore}': it is 'cache' or 'identity'")
        self.backbone = backbone
        self.roles = roles
        self.restore = restore
        self.segments: list[Segment] = []
        for role, layers in groupby(range(depth), key=lambda layer: roles[layer]):
            run = list(layers)
            self.segments.append(Segment(role, run[0], run[-1] + 1))

    @property
    def spans(self) -> list[Segment]:
        """The runs of detail layers, in order."""
        return [segment for segment in self.segments if segment.role == "d"]

    def forward(
        self,
        x: Tensor,
        context: Context,
        rope: Tensor | None,
        keep_slots: Tensor | None,
        area_rows: Tensor | None,
        area_cols: Tensor | None,
        past: list[Tensor],
        span_cache: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One scale.

        Args:
            x: input tokens `[N, R, C]` fp32.
            context: `Prefix.context`.
            rope: `[N, 1, F]` or None.
            keep_slots: `[K]` int32; only its length counts. None in a dense graph.
            area_rows, area_cols: `[h, hc]`, `[w, wc]` fp32 of `restore_constants`; None where no cache is used.
            past: `k0, v0, k1, v1, ...`, each `[P, R, H, D]`; P of a layer depends on its role, and may be 0.
            span_cache: a span's change at the cached scale, `[hc * wc, R, C]` fp32 each.

        Returns: logits `[N, R, V]`, new_kv, span_deltas, as in `StepOutput`.
        """
        output = self.run(x, context, rope, keep_slots, area_rows, area_cols, past, span_cache)
        return output.logits, output.new_kv, output.span_deltas

    def run(
        self,
        x: Tensor,
        context: Context,
        rope: Tensor | None,
        keep_slots: Tensor | None,
        area_rows: Tensor | None,
        area_cols: Tensor | None,
        past: list[Tensor],
        span_cache: list[Tensor],
        *,
        entropy: EntropyMode = "none",
        keep_hidden: bool = False,
    ) -> StepOutput:
        """`forward` with everything seen on the way; `entropy` asks every layer for it, not only those that select.

        `keep_hidden` fills `StepOutput.hidden`: the outputs of all layers at once, 8 GiB at the last scale of Infinity-2B
        with four images.
        """
        new_kv: list[Tensor] = []
        span_deltas: list[Tensor] = []
        entropies: list[Tensor | None] = []
        kept: list[Tensor] = []
        hidden: list[Tensor] = []

        def run_layers(segment: Segment, h: Tensor, h_rope: Tensor | None, last: EntropyMode) -> Tensor:
            for layer in range(segment.start, segment.stop):
                mode = last if layer == segment.stop - 1 and entropy == "none" else entropy
                layer_context = self.backbone.layer_context(layer, context)
                block = self.backbone.blocks[layer]
                output = block(h, layer_context, past[2 * layer], past[2 * layer + 1], rope=h_rope, entropy=mode)
                h = output.x
                new_kv.extend((output.new_k, output.new_v))
                entropies.append(output.entropy)
                if keep_hidden:
                    hidden.append(h)
            return h

        images = x.shape[1] // self.backbone.branches
        for index, segment in enumerate(self.segments):
            if segment.role == "g":
                selects = index + 1 < len(self.segments)
                x = run_layers(segment, x, rope, "mean" if selects else "none")
                continue
            score = entropies[-1]
            assert score is not None and keep_slots is not None
            if score.dim() == 3:  # [R, H, N]
                score = score.mean(1)
            indices = select_tokens(score[:images], keep_slots)
            kept.append(indices)
            before = gather_tokens(x, indices)
            kept_rope = None
            if rope is not None:
                kept_rope = gather_tokens(rope.expand(-1, x.shape[1], -1), indices)
            after = run_layers(segment, before, kept_rope, "none")
            if self.restore == "identity":
                x = scatter_tokens(x, after, indices)
            else:
                assert area_rows is not None and area_cols is not None
                x = restore_tokens(x, after, indices, span_cache[len(span_deltas)], area_rows, area_cols)
                span_deltas.append(after - before)
        return StepOutput(self.backbone.head(x, context), new_kv, span_deltas, entropies, kept, hidden)
