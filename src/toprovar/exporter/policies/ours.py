"""ToProVAR as policies: ours, as a plan decides it, with stages switched off or replaced; and the paper's literal rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toprovar.backbones.base import Backbone, Constants, EntropyMode, restore_constants
from toprovar.backbones.generate import Pruning
from toprovar.exporter.policies.engine import Policy, State
from toprovar.kernels import gather_tokens, restore_tokens, scatter_tokens

__all__ = ["Choice", "Literally", "Planned", "head_temperatures", "token_scores"]

Choice = Literal["entropy", "highest", "random", "temperature", "log-keys"]
"""Which tokens a span keeps: those of least mean entropy (ours), of most, any, of least entropy with each head's divided by its
temperature, of least entropy divided by the log of the number of keys."""


def head_temperatures(backbone: Backbone, layer: int) -> Tensor:
    """The learned factor of q of each head, `[H]` fp32; ones where attention is not cosine."""
    block: Any = backbone.blocks[layer]
    attn = block.sa if hasattr(block, "sa") else block.attn
    if attn.scale_mul_1H11 is None:
        return torch.ones(backbone.spec.heads, device=backbone.device)
    multiplier: Tensor = attn.scale_mul_1H11.float().clamp_max(math.log(100.0)).exp().reshape(-1)
    return multiplier


def token_scores(choice: Choice, entropy: Tensor, temperatures: Tensor, keys: int) -> Tensor:
    """One number a token, least is kept first.

    Args: entropy `[B, H, N]` nats; temperatures `[H]`; keys: how many keys each query saw.
    Returns: `[B, N]`.
    """
    if choice == "temperature":
        # A head that multiplies q by more is more focused at the same directions: dividing brings heads to one scale, in which
        # no diffuse head outweighs the others.
        weights = temperatures / temperatures.mean()
        return (entropy * weights[None, :, None]).mean(1)
    mean = entropy.mean(1)
    if choice == "log-keys":
        return mean / math.log(max(keys, 2))
    return -mean if choice == "highest" else mean


@dataclass(frozen=True)
class Planned(Policy):
    """A plan's pruning of one prompt class: the step graph's own arithmetic, layer by layer.

    Args:
        pruning: as `toprovar.exporter.prune.pruning` gives it.
        choice: which tokens detail layers keep.
        skips: detail layers are left out altogether at pruned scales (the paper's arm without the token stage).
    """

    pruning: Pruning
    choice: Choice = "entropy"
    skips: bool = False

    def following(self, state: State) -> int | None:
        run = self.pruning.scales_run
        following = super().following(state)
        return following if following is not None and (run is None or following in run) else None

    def step(self, state: State, x: Tensor, constants: Constants) -> Tensor:
        spec, scale, pruning = state.backbone.spec, state.scale, self.pruning
        tokens, rope = x.shape[0], constants.get("rope")
        kept = 0 if self.skips and pruning.keep[scale] < tokens else pruning.keep[scale]
        prunes = kept < tokens and "d" in pruning.roles
        deltas: list[Tensor] = []
        masks: list[Tensor] = []
        cached: list[Tensor] | None = state.memory.get("spans")
        resize = None
        if prunes:
            state.keep(max(kept, 1e-9))
            if cached is not None and pruning.cache_scale is not None:
                resize = [m.to(x.device) for m in restore_constants(spec, scale, pruning.cache_scale)]

        runs = [(role, list(layers)) for role, layers in groupby(range(spec.depth), key=lambda i: pruning.roles[i])]
        score: Tensor | None = None
        for position, (role, layers) in enumerate(runs):
            if role == "g" or not prunes:
                before = x
                for layer in layers:
                    asks = role == "g" and prunes and layer == layers[-1] and position + 1 < len(runs)
                    output = state.block(layer, x, rope, self._mode() if asks else "none")
                    x = output.x
                    if asks and output.entropy is not None:
                        score = self._score(state, layer, output.entropy)
                if role == "d" and scale == pruning.cache_scale:
                    deltas.append(x - before)
                continue
            assert score is not None
            indices = score.sort(dim=1, stable=True).indices[:, :kept].sort(dim=1).values.to(torch.int32)
            masks.append(torch.zeros_like(score, dtype=torch.bool).scatter(1, indices.long(), True))
            restoring = None
            if cached is not None and resize is not None:
                restoring = (cached[len(masks) - 1], resize[0], resize[1])
            x = self._span(state, x, rope, layers, indices, restoring)
        if scale == pruning.cache_scale and pruning.restore == "cache":
            state.memory["spans"] = deltas
        if masks:
            state.masks[scale] = torch.stack(masks, dim=1)
        return state.head(x)

    def _mode(self) -> EntropyMode:
        return "head" if self.choice in ("temperature", "log-keys") else "mean"

    def _score(self, state: State, layer: int, entropy: Tensor) -> Tensor:
        """`[B, N]`, of the conditional rows."""
        if self.choice == "random":
            rows = [torch.rand(entropy.shape[-1], generator=one) for one in state.generators(1000 + layer)]
            return torch.stack(rows).to(entropy.device)
        per_head = entropy[: state.images] if entropy.dim() == 3 else entropy[: state.images, None]
        return token_scores(self.choice, per_head, head_temperatures(state.backbone, layer), state.cache.lengths[layer])

    def _span(
        self,
        state: State,
        x: Tensor,
        rope: Tensor | None,
        layers: Sequence[int],
        indices: Tensor,
        cached: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Tensor:
        if indices.shape[1] == 0:  # nothing is kept: what the span added at the cached scale, for every token
            if cached is None:
                return x
            delta, rows, cols = cached
            (h, hc), (w, wc), (_, r, c) = rows.shape, cols.shape, delta.shape
            return x + (cols @ (rows @ delta.reshape(hc, wc * r * c)).reshape(h, wc, r * c)).reshape(h * w, r, c)
        part = gather_tokens(x, indices)
        turn = None if rope is None else gather_tokens(rope.expand(-1, x.shape[1], -1).contiguous(), indices)
        for layer in layers:
            part = state.block(layer, part, turn).x
        if cached is None:
            return scatter_tokens(x, part, indices)
        return restore_tokens(x, part, indices, *cached)


@dataclass(frozen=True)
class Literally(Policy):
    """The paper's own rule where it is well defined (ToProVAR, eqs. 3 to 6 and appendix A.5, eq. 13).

    D is found for each picture while it is made: the first scale of 2 x 2 or more with rho <= tau (the map averaged over
    layers); the scales *behind* it are pruned. Detail layers prune token i with probability clip(alpha_min + (alpha_max -
    alpha_min) q_i), q_i = phi(s) R H_i / sum H, drawn for each layer; H is that of the last global layer, since a pruned
    layer has none of its own. The paper gives no restore rule: a pruned token passes through. Nor does it give alpha and beta:
    0.4, 0.9, and the beta for which the median layer has R = 0.5.

    Args:
        scores: R of each layer. A layer is detail where R >= 0.5; the first is global.
        drop: how many last scales are not run.
    """

    scores: tuple[float, ...]
    tau: float = 0.4
    alpha_min: float = 0.4
    alpha_max: float = 0.9
    drop: int = 0
    adaptive: ClassVar[bool] = True

    def following(self, state: State) -> int | None:
        following = super().following(state)
        return following if following is not None and following < state.backbone.spec.scales - self.drop else None

    def step(self, state: State, x: Tensor, constants: Constants) -> Tensor:
        scale, rope = state.scale, constants.get("rope")
        scales = state.backbone.spec.scales
        prunes = state.memory.get("depth") is not None
        generator = state.generators(7)[0]
        entropies: list[Tensor] = []
        kept, pruned_layers = 0, 0
        for layer, score in enumerate(self.scores):
            if not prunes or layer == 0 or score < 0.5:
                output = state.block(layer, x, rope, "mean")
                x = output.x
                assert output.entropy is not None
                entropies.append(output.entropy[0])
                continue
            share = entropies[-1] / entropies[-1].sum()
            q = (scale + 1) / scales * score * share
            gone = (self.alpha_min + (self.alpha_max - self.alpha_min) * q).clamp(0, 1).cpu()
            stays = torch.rand(gone.shape, generator=generator) >= gone
            indices = stays.nonzero().flatten().to(torch.int32).to(x.device)[None]
            kept, pruned_layers = kept + indices.shape[1], pruned_layers + 1
            if indices.shape[1] == 0:
                continue
            turn = None if rope is None else gather_tokens(rope.expand(-1, x.shape[1], -1).contiguous(), indices)
            x = scatter_tokens(x, state.block(layer, gather_tokens(x, indices), turn).x, indices)
        if pruned_layers:
            state.keep(max(kept / pruned_layers, 1e-9))
        elif min(state.grid) >= 2:
            mean = torch.stack(entropies).mean(0)
            if float((mean < mean.mean()).float().mean()) <= self.tau:
                state.memory["depth"] = scale
        return state.head(x)
