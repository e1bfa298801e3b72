"""Rival methods, re-implemented from their papers and public code with the published constants.

Each class says its source. Constants are for Infinity-2B at 1M pixels; `grids` says how another schedule takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar.backbones.base import Backbone, Constants, guide
from toprovar.backbones.infinity import Infinity
from toprovar.backbones.resample import area_matrix
from toprovar.exporter.policies.branches import branches_of
from toprovar.exporter.policies.engine import Policy, State
from toprovar.exporter.policies.grids import nearest_published, place, share_of_depth
from toprovar.kernels import gather_tokens
from toprovar.profiles.flops import layer_flops

__all__ = [
    "SKIPVAR_MODELS",
    "DropLast",
    "FasterVar",
    "FastVar",
    "Logistic",
    "SkipVar",
    "SkipVarModel",
    "SparseVar",
    "farthest_from_mean",
]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing but leaving out the last scales


@dataclass(frozen=True)
class DropLast(Policy):
    """The dense model without its last scales: the picture is decoded from the codes so far."""

    scales: int

    def following(self, state: State) -> int | None:
        following = state.scale + 1
        return following if following < state.backbone.spec.scales - self.scales else None


# ---------------------------------------------------------------------------------------------------------------------
# FastVAR


def farthest_from_mean(x: Tensor, count: int) -> Tensor:
    """FastVAR's choice: the tokens farthest (L2) from the mean token of their own row.

    Args: x `[N, R, C]`.
    Returns: `[R, count]` int32, farthest first.
    """
    distance = (x - x.mean(0, keepdim=True)).square().sum(-1)  # [N, R]
    return distance.argsort(dim=0, descending=True)[:count].T.to(torch.int32)


@dataclass(frozen=True)
class FastVar(Policy):
    """FastVAR (ICCV 2025, arXiv 2503.23367; csguoh/FastVAR, commit 34cdd65).

    Before every branch of a pruned layer the tokens farthest from the mean are chosen anew, each row by itself; the others get
    what the same branch gave at the cached scale, resized by area. Kept tokens alone enter the cache of keys.

    Args:
        ratios: published side -> share of the tokens that is pruned. K = N - int(N * ratio).
        skipped: published sides that are not run.
        cached: published side whose branch outputs are kept.
        layers: first and last pruned layer of a model of 32.
        cross: whether the cross-attention is pruned too.
    """

    ratios: tuple[tuple[int, float], ...] = ((32, 0.4), (40, 0.5))
    skipped: tuple[int, ...] = (48, 64)
    cached: int = 24
    layers: tuple[int, int] = (3, 27)
    cross: bool = True

    HART: ClassVar[dict[str, Any]] = {
        "ratios": ((48, 0.5), (64, 0.75)), "skipped": (), "cached": 36, "layers": (0, 31), "cross": False,
    }  # fmt: skip
    """The constants of the same code for HART: no scale is skipped, all layers are pruned, cross-attention is dense."""

    def _cached_scale(self, state: State) -> int:
        """The scale at the cached grid's place, or the nearest one before the pruned scales."""
        grids = state.backbone.spec.grids
        free = [s for s in range(len(grids)) if not self._ratio(state, s) and not self._skipped(state, s)]
        return min(free, key=lambda s: abs(math.log(place(grids, s) / (self.cached / 64))))

    def _skipped(self, state: State, scale: int) -> bool:
        return nearest_published(state.backbone.spec.grids, scale) in self.skipped

    def _ratio(self, state: State, scale: int) -> float:
        return dict(self.ratios).get(nearest_published(state.backbone.spec.grids, scale), 0.0)

    def following(self, state: State) -> int | None:
        following = super().following(state)
        return None if following is None or self._skipped(state, following) else following

    def step(self, state: State, x: Tensor, constants: Constants) -> Tensor:
        return state.head(self.layers_of(state, x, constants.get("rope")))

    def layers_of(self, state: State, x: Tensor, rope: Tensor | None) -> Tensor:
        """All layers of a scale: `x [N, R, C]` before and after them."""
        depth, tokens = len(state.backbone.blocks), x.shape[0]
        caches: dict[tuple[int, str], Tensor] = state.memory.setdefault("branches", {})
        caching = state.scale == self._cached_scale(state)
        ratio = self._ratio(state, state.scale)
        first, last = (share_of_depth(depth, layer, 32) for layer in (self.layers[0], self.layers[1] + 1))
        kept = tokens - int(tokens * ratio)
        resize = None
        if ratio:
            state.keep(kept)
            grid, cached = state.grid, state.backbone.spec.grids[self._cached_scale(state)]
            resize = [area_matrix(a, b).to(x.device) for a, b in zip(grid, cached, strict=True)]

        for layer in range(depth):
            pruned = bool(ratio) and first <= layer < last
            branches = branches_of(state.backbone, layer, state.context)

            def restored(name: str, update: Tensor, indices: Tensor | None, layer: int = layer) -> Tensor:
                """The update of all tokens; at the cached scale it is remembered."""
                if indices is not None:
                    assert resize is not None
                    update = _restore(caches[layer, name], update, indices, *resize)
                if caching:
                    caches[layer, name] = update
                return update

            indices = farthest_from_mean(x, kept) if pruned else None
            part, turn = (x, rope) if indices is None else (_rows(x, indices), _rope_rows(rope, x, indices))
            past_k, past_v = state.cache.past(layer)
            attended = branches.attention(part, turn, past_k, past_v)
            state.count(layer_flops(state.shape, part.shape[0], past_k.shape[0] + part.shape[0]))
            state.cache.append(layer, attended.new_k, attended.new_v)
            x = x + restored("attention", attended.update, indices)
            if branches.cross is not None:
                indices = farthest_from_mean(x, kept) if pruned and self.cross else None
                if pruned and not self.cross:  # counted above as if it had been pruned with the rest
                    state.count(_cross_flops(state, tokens - kept))
                x = x + restored("cross", branches.cross(x if indices is None else _rows(x, indices)), indices)
            indices = farthest_from_mean(x, kept) if pruned else None
            x = x + restored("ffn", branches.ffn(x if indices is None else _rows(x, indices)), indices)
        return x


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """`x [N, R, C]`, `indices [R, K]` -> `[K, R, C]`: every row its own tokens."""
    return gather_tokens(x.contiguous(), indices)


def _rope_rows(rope: Tensor | None, x: Tensor, indices: Tensor) -> Tensor | None:
    return None if rope is None else gather_tokens(rope.expand(-1, x.shape[1], -1).contiguous(), indices)


def _restore(cache: Tensor, kept: Tensor, indices: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """`cache [hc * wc, R, C]` resized to the scale's grid, with `kept [K, R, C]` written at `indices [R, K]`."""
    (h, hc), (w, wc), (_, r, c) = rows.shape, cols.shape, cache.shape
    tall = rows @ cache.reshape(hc, wc * r * c)
    grid = (cols @ tall.reshape(h, wc, r * c)).reshape(h * w, r, c)
    return grid.scatter(0, indices.long().T[..., None].expand(-1, -1, c), kept)


def _cross_flops(state: State, tokens: int) -> int:
    """One row: a cross-attention of `tokens` tokens."""
    width, text = state.shape.width, state.shape.text_tokens
    return tokens * (4 * width * width + 4 * text * width)


# ---------------------------------------------------------------------------------------------------------------------
# SkipVAR


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression on standardised features; the class of the largest score wins."""

    mean: tuple[float, float]
    scale: tuple[float, float]
    weights: tuple[tuple[float, float], ...]
    intercepts: tuple[float, ...]
    classes: tuple[int, ...]

    def predict(self, features: tuple[float, float]) -> int:
        values = [(f - m) / s for f, m, s in zip(features, self.mean, self.scale, strict=True)]
        scores = [
            sum(w * v for w, v in zip(row, values, strict=True)) + b
            for row, b in zip(self.weights, self.intercepts, strict=True)
        ]
        return self.classes[scores.index(max(scores))]


@dataclass(frozen=True)
class SkipVarModel:
    """SkipVAR's two decisions: how many last scales to leave out, and, if none, how many to run without guidance."""

    skip: Logistic
    unguided: Logistic


_FEATURES = ((0.115321, 0.489232), (0.057648, 0.075618))
SKIPVAR_MODELS = {
    "0.84": SkipVarModel(
        Logistic(*_FEATURES,
                 ((1.924273, 1.723840), (0.960067, 0.297114), (-0.059410, -0.550504), (-2.824930, -1.470450)),
                 (-0.890967, 0.738915, 0.806835, -0.654783), (0, 1, 2, 3)),
        Logistic((0.179379, 0.573613), (0.062733, 0.053962),
                 ((1.016302, 0.991019), (0.317317, -0.002943), (-1.333619, -0.988076)),
                 (-2.848020, 0.455751, 2.392269), (1, 2, 3)),
    ),
    "0.88": SkipVarModel(
        Logistic(*_FEATURES,
                 ((2.296699, 1.678845), (1.347617, 0.189207), (-0.340282, -0.562333), (-3.304033, -1.305719)),
                 (1.612211, 1.543251, 0.186340, -3.341803), (0, 1, 2, 3)),
        Logistic((0.151241, 0.542384), (0.057950, 0.057830),
                 ((1.374748, 0.856854), (0.823358, 1.019983), (-0.121857, -0.502583), (-2.076250, -1.374255)),
                 (-6.027575, -0.759728, 3.035493, 3.751691), (0, 1, 2, 3)),
    ),
}  # fmt: skip
"""Its decision models by the SSIM that they were trained for (fakerone-li/SkipVAR, commit 607be0e)."""

_STOPS = {3: 40, 2: 48, 1: 64}
"""Class of a decision -> the published side from which on scales are left out, or run without guidance."""


@dataclass(frozen=True)
class SkipVar(Policy):
    """SkipVAR (arXiv 2506.08908; fakerone-li/SkipVAR, commit 607be0e).

    Behind the scale at the place of 32 x 32 the codes of the last two scales are decoded small (the latent at the place of
    8 x 8); how much the edges changed, and how much of the spectrum is high, decide for each picture what the late scales do.
    """

    model: SkipVarModel
    adaptive: ClassVar[bool] = True

    def _decides(self, state: State) -> bool:
        grids = state.backbone.spec.grids
        behind = [s for s in range(len(grids)) if place(grids, s) <= 0.5 + 1e-6]
        return state.scale == behind[-1]

    @staticmethod
    def _behind(state: State, scale: int, decision: int) -> bool:
        return decision > 0 and place(state.backbone.spec.grids, scale) >= _STOPS[decision] / 64 - 1e-6

    def before(self, state: State) -> None:
        if self._behind(state, state.scale, state.memory.get("unguided", 0)):
            state.use_rows("conditional")

    def following(self, state: State) -> int | None:
        following = super().following(state)
        if following is None:
            return None
        if self._decides(state):
            features = self.features(state)
            skip = self.model.skip.predict(features)
            state.memory |= {
                "features": features,
                "skip": skip,
                "unguided": 0 if skip else self.model.unguided.predict(features),
            }
        return None if self._behind(state, following, state.memory.get("skip", 0)) else following

    @staticmethod
    def features(state: State) -> tuple[float, float]:
        """Mean change of the Sobel gradient from the scale before, and the share of the spectrum outside a circle."""
        before, after = (_small(state.backbone, state.codes_after[s]) for s in (state.scale - 1, state.scale))
        change = (_sobel(after) - _sobel(before)).abs().mean()
        amplitude = torch.fft.fftshift(torch.fft.fft2(after.mean(1))).abs()[0]
        height, width = amplitude.shape
        y, x = (torch.arange(n, device=amplitude.device) - n // 2 for n in (height, width))
        outside = (y[:, None] ** 2 + x[None] ** 2).sqrt() > int(0.4 * min(height, width) / 2)
        return float(change), float((amplitude * outside).sum() / (amplitude.sum() + 1e-6))


def _small(backbone: Backbone, codes: Tensor) -> Tensor:
    """A picture in [-1, 1] of the codes shrunk to an eighth of the latent grid."""
    size = tuple(max(n // 8, 1) for n in codes.shape[-2:])
    shrunk = F.interpolate(codes, size=size, mode="bilinear", align_corners=False)
    return backbone.decode(shrunk) * 2 - 1


def _sobel(image: Tensor) -> Tensor:
    kernel = image.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])[None, None]
    grey = image.mean(1, keepdim=True)
    across, down = (F.conv2d(grey, k, padding=1) for k in (kernel, kernel.mT.contiguous()))
    return (across.square() + down.square()).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# SparseVAR


@dataclass(frozen=True)
class SparseVar(Policy):
    """SparseVAR (ICCV 2025, arXiv 2507.20454), as re-implemented in Weepingchestnut/Lvar (commit f94b7ec).

    From the scale at the place of 40 x 40 on, tokens that the middle of the model changed little at the scale before are left
    out of all layers, save a regular grid of anchors; behind the last layer each takes the feature of the most similar of its
    four nearest anchors, or, where none is similar, adds nothing to the picture.

    Args:
        threshold: of the change over the largest change; the share of tokens above it is kept.
        anchors: distance of anchors in tokens, as published (not scaled with the grid).
        similarity: of logits (cosine) from which on an anchor may stand in.
    """

    threshold: float = 0.6
    anchors: int = 4
    similarity: float = 0.8
    adaptive: ClassVar[bool] = True

    _FROM: ClassVar[float] = 40 / 64
    _CHUNK: ClassVar[tuple[int, int]] = (12, 16)  # layers 12 to 15 of 32: the fourth of eight chunks

    def step(self, state: State, x: Tensor, constants: Constants) -> Tensor:
        grids, depth = state.backbone.spec.grids, len(state.backbone.blocks)
        start, stop = (share_of_depth(depth, layer, 32) for layer in self._CHUNK)
        prunes = place(grids, state.scale) >= self._FROM - 1e-6
        following = state.scale + 1
        measures = following < len(grids) and place(grids, following) >= self._FROM - 1e-6
        rope = constants.get("rope")
        indices, part = None, x
        if prunes:
            choice = self._choose(state)
            indices = choice["kept"][None].to(torch.int32).expand(x.shape[1], -1)
            part, rope = _rows(x, indices), _rope_rows(rope, x, indices)
            state.keep(indices.shape[1])

        before = part
        for layer in range(depth):
            if layer == start:
                before = part
            part = state.block(layer, part, rope).x
            if layer == stop - 1 and measures:
                change = (part - before).square().mean(-1).mean(1)  # over channels, then the rows of guidance
                if indices is not None:
                    change = change.new_zeros(x.shape[0]).scatter(0, indices[0].long(), change)
                state.memory["change"] = change
        if indices is not None:
            full = x.scatter(0, indices.long().T[..., None].expand(-1, -1, x.shape[2]), part)
            dropped, anchor, similar = choice["dropped"], choice["anchor"], choice["similar"]
            full[dropped[similar]] = full[anchor[similar]]
            silent = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
            silent[dropped[~similar]] = True
            state.memory["silent"] = silent
            part = full
        logits = state.head(part)
        if measures:
            weights = constants["guidance"]
            state.guided_logits = guide(logits, weights)
        return logits

    def _choose(self, state: State) -> dict[str, Tensor]:
        """Which tokens are kept, and which anchor each other one may take its feature from."""
        (h, w), (ph, pw) = state.grid, state.backbone.spec.grids[state.scale - 1]
        change: Tensor = state.memory["change"]
        assert state.guided_logits is not None
        maps = torch.cat([change[None], state.guided_logits[:, 0].T])  # [1 + V, N before]
        upsampled = F.interpolate(maps.reshape(1, -1, ph, pw), size=(h, w), mode="nearest").flatten(2)[0]
        change_here, features = upsampled[0], upsampled[1:].T
        count = int(h * w * float((change > self.threshold * change.max()).float().mean()))
        kept = torch.zeros(h * w, dtype=torch.bool, device=change.device)
        kept[change_here.sort().indices[h * w - count :]] = True

        rows, cols = (torch.tensor(sorted({*range(0, n, self.anchors), n - 1}), device=change.device) for n in (h, w))
        anchors = (rows[:, None] * w + cols[None]).flatten()
        kept[anchors] = True
        dropped = (~kept).nonzero().flatten()
        apart = (dropped // w)[:, None] - (anchors // w)[None], (dropped % w)[:, None] - (anchors % w)[None]
        nearest = anchors[(apart[0] ** 2 + apart[1] ** 2).sort(1).indices[:, :4]]  # [dropped, 4]
        likeness = F.cosine_similarity(features[dropped][:, None], features[nearest], dim=-1)
        best, which = likeness.max(1)
        return {
            "kept": kept.nonzero().flatten(),
            "dropped": dropped,
            "anchor": nearest.gather(1, which[:, None])[:, 0],
            "similar": best > self.similarity,
        }

    def accumulate(self, state: State, tokens: Tensor, constants: Constants) -> Tensor:
        silent: Tensor | None = state.memory.pop("silent", None)
        if silent is None:
            return super().accumulate(state, tokens, constants)
        return _accumulate_without(state, tokens, silent, constants)


def _accumulate_without(state: State, tokens: Tensor, silent: Tensor, constants: Constants) -> Tensor:
    """Codes after the scale if the codes of `silent [N]` tokens were zero."""
    backbone: Any = state.backbone
    if not isinstance(backbone, Infinity):
        vectors = backbone.vae.quantize.embedding(tokens) * ~silent[None, :, None]
        accumulated: Tensor = backbone.accumulate_vectors(vectors, state.codes, constants)
        return accumulated
    # A bit is +1 or -1 and never 0: half the difference of the codes of these bits and of their complements is their code, and
    # where a silent token takes part with its own bits in both, its code cancels.
    complement = torch.where(silent[None, :, None], tokens, 1 - tokens)
    ours, other = (backbone.accumulate(bits.to(torch.int32), state.codes, constants) for bits in (tokens, complement))
    codes: Tensor = state.codes + (ours - other) / 2
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# StageVAR, later FasterVAR

_RATIOS = {
    40: (0.016777, 0.136483, 0.210392, 0.250282, 0.255884, 0.197879, 0.157002, 0.190900),
    48: (0.013403, 0.117307, 0.189406, 0.221995, 0.234642, 0.182782, 0.133909, 0.163112),
    64: (0.008213, 0.054404, 0.083235, 0.066494, 0.056672, 0.029677, 0.038261, 0.055663),
}
"""Published side -> rank over tokens for each of eight chunks of layers, alpha = 0.96."""


@dataclass(frozen=True)
class FasterVar(Policy):
    """FasterVAR, first StageVAR (arXiv 2512.16483; sen-mao/FasterVAR, commit 0653b99).

    At the scales of the places of 40, 48 and 64 only the unconditional rows run, and each chunk of layers runs on
    r = int(ratio N) + 1 random mixtures of the tokens. What comes out is written to r tokens, drawn with probability
    proportional to their squared norm, over the chunk's output at the scale before, resized by area.

    Args:
        skipped: published sides that are not run; the public code for Infinity skips 48 and 64.
        rows: "unconditional" as the code does, or "both" for the low rank by itself.
    """

    skipped: tuple[int, ...] = (48, 64)
    rows: Literal["unconditional", "both"] = "unconditional"

    def _ratios(self, state: State, scale: int) -> tuple[float, ...] | None:
        return _RATIOS.get(nearest_published(state.backbone.spec.grids, scale))

    def following(self, state: State) -> int | None:
        following = super().following(state)
        if following is None or nearest_published(state.backbone.spec.grids, following) in self.skipped:
            return None
        return following

    def before(self, state: State) -> None:
        if self._ratios(state, state.scale) is not None:
            before = state.rows
            state.use_rows(self.rows)
            if state.rows != before and "chunks" in state.memory:
                state.memory["chunks"] = [chunk[:, state.images :] for chunk in state.memory["chunks"]]

    def step(self, state: State, x: Tensor, constants: Constants) -> Tensor:
        depth, rope = len(state.backbone.blocks), constants.get("rope")
        ratios = self._ratios(state, state.scale)
        bounds = [share_of_depth(depth, chunk, 8) for chunk in range(9)]
        outputs: list[Tensor] = []
        kept = 0.0
        for chunk, (start, stop) in enumerate(pairwise(bounds)):
            if ratios is None:
                for layer in range(start, stop):
                    x = state.block(layer, x, rope).x
            elif start < stop:
                rank = int(ratios[chunk] * x.shape[0]) + 1
                kept += rank * (stop - start) / depth
                x = self._low_rank(state, x, rope, range(start, stop), chunk, rank)
            outputs.append(x)
        if ratios is not None:
            state.keep(kept)
        state.memory["chunks"], state.memory["chunks_grid"] = outputs, state.grid
        return state.head(x)

    def _low_rank(self, state: State, x: Tensor, rope: Tensor | None, layers: range, chunk: int, rank: int) -> Tensor:
        tokens, rows, width = x.shape
        mixtures, places = [], []
        for row in range(rows):
            # A generator of its own for each picture and row, on the CPU: the same draw on every machine.
            image = row % state.images
            generator = state.generators(16 * chunk + row // state.images)[image]
            mixtures.append(torch.randn(tokens, rank, generator=generator) / math.sqrt(rank))
            weights = x[:, row].square().sum(-1).cpu()
            places.append(torch.multinomial(weights, rank, generator=generator))
        mixture, place_ = torch.stack(mixtures).to(x.device), torch.stack(places).to(x.device)  # [R, N, r], [R, r]
        low = torch.bmm(mixture.mT, x.transpose(0, 1)).transpose(0, 1)  # [r, R, C]
        state.count(2 * rank * tokens * width)
        turn = None if rope is None else rope[:rank]
        for layer in layers:
            low = state.block(layer, low, turn).x
        grid, before = state.grid, state.memory["chunks_grid"]
        resize = [area_matrix(a, b).to(x.device) for a, b in zip(grid, before, strict=True)]
        return _restore(state.memory["chunks"][chunk], low, place_, *resize)
