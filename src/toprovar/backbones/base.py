"""What a next-scale backbone is, to everything that calibrates, exports or runs one.

A picture is made scale by scale. `prefix` turns the condition into everything that depends on it alone; then, for each
scale, `Step` (in `step.py`) runs the blocks, and `advance` draws the tokens, adds their codes to the code map and
makes the input of the next scale; `decode` makes the picture. Each of the four becomes one ONNX graph.

Names of sizes, the same in every file: `N` tokens of the scale, `B` images, `R` rows of the transformer (rows 0..B-1
conditional, B..2B-1 unconditional under guidance), `C` width, `H` heads, `D` head dim, `K` kept tokens, `P` keys of the
past, `V` logits per token. Tensors are sequence-first, so the keys of a scale are one contiguous piece of the cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from toprovar.backbones.resample import area_matrix
from toprovar.errors import InputError

__all__ = [
    "Backbone",
    "BlockOutput",
    "Constants",
    "Context",
    "EntropyMode",
    "Prefix",
    "Sampling",
    "Spec",
    "filter_logits",
    "guide",
    "gumbel",
    "layer_norm",
    "restore_constants",
]

Context = Mapping[str, Tensor]
Constants = Mapping[str, Tensor]
EntropyMode = Literal["none", "mean", "head"]


@dataclass(frozen=True)
class Spec:
    """The sizes of a backbone: what planning, FLOP counts, graphs and runtimes need to know of it."""

    backbone: str
    depth: int
    width: int
    heads: int
    head_dim: int
    ffn_width: int
    vocab: int
    """V, logits per token: the codebook size of a VQ model, 2 x bits of a bitwise one."""
    grids: tuple[tuple[int, int], ...]
    """(h, w) of the token map of every scale."""
    latent_channels: int
    latent_grid: tuple[int, int]
    """(h, w) of the accumulated code map, the input of the decoder."""
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    attention_scale: float
    """What multiplies q.k before the softmax; 1 for cosine attention."""
    rope_width: int = 0
    """F of the rope table `[N, 1, F]` that `scale_constants` gives, 0 for a backbone without one."""

    @property
    def scales(self) -> int:
        return len(self.grids)

    @property
    def tokens(self) -> tuple[int, ...]:
        """N of every scale."""
        return tuple(h * w for h, w in self.grids)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits. Constants of the `advance` graph, except what `scale_constants` carries.

    `top_k=1` is greedy. 0 turns a filter off. `guidance` and `temperature` may be one number or one per scale.
    `guided=False` runs the conditional rows alone (R = B).
    """

    guidance: float | tuple[float, ...] = 1.0
    temperature: float | tuple[float, ...] = 1.0
    top_k: int = 0
    top_p: float = 0.0
    guided: bool = True

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise InputError(f"sampling: top_k is {self.top_k}; give a count of logits to keep, or 0 for no filter")
        if not 0.0 <= self.top_p <= 1.0:
            raise InputError(f"sampling: top_p is {self.top_p}; give a probability in [0, 1], 0 for no filter")
        for name in ("guidance", "temperature"):
            given = getattr(self, name)
            if not all(math.isfinite(value) for value in (given if isinstance(given, tuple) else (given,))):
                raise InputError(f"sampling: {name} is {given}; give finite numbers")
        given = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not all(value > 0 for value in given):
            raise InputError(f"sampling: temperature is {self.temperature}; give numbers above 0; top_k 1 is greedy")

    def at(self, name: Literal["guidance", "temperature"], scale: int) -> float:
        """The value of `guidance` or `temperature` at a scale; a list that is too short repeats its last value."""
        value: float | tuple[float, ...] = getattr(self, name)
        if isinstance(value, tuple):
            return value[min(scale, len(value) - 1)]
        return value


class Prefix(NamedTuple):
    """What depends on the condition alone: computed once per image.

    `x0 [N0, R, C]` fp32 is the input of the first scale. `context` is what every scale needs; `Backbone.layer_context`
    takes one layer's share of it.
    """

    x0: Tensor
    context: dict[str, Tensor]


class BlockOutput(NamedTuple):
    """`x [n, R, C]` fp32; `new_k`, `new_v [n, R, H, D]`; `entropy [R, n]` ("mean"), `[R, H, n]` ("head"), fp32 nats."""

    x: Tensor
    new_k: Tensor
    new_v: Tensor
    entropy: Tensor | None


class Tokenizer(Protocol):
    """What a backbone needs of its VAE."""

    def decode(self, codes: Tensor) -> Tensor:
        """`codes [B, latent_channels, h, w]` -> RGB `[B, 3, height, width]` fp32 in [-1, 1]."""


class Backbone(nn.Module, ABC):
    """A next-scale model. Subclasses set `spec`, `sampling`, `blocks` and `vae`.

    `blocks[layer](x [n, R, C] fp32, layer context, past_k, past_v [P, R, H, D], rope=None | [n, 1 or R, F],
    entropy="none" | "mean" | "head") -> BlockOutput`: one transformer layer, its attention through
    `toprovar.kernels.entropy_attention` and nothing else.
    """

    spec: Spec
    sampling: Sampling
    blocks: nn.ModuleList
    vae: Tokenizer
    head: Callable[[Tensor, Context], Tensor]
    """`x [N, R, C]`, context -> logits `[N, R, V]` fp32. A method or a module."""

    @property
    def branches(self) -> int:
        """R / B: 2 where conditional and unconditional rows run together, else 1."""
        return 2 if self.sampling.guided else 1

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the blocks' matrices, and so of keys and values; x, logits and codes are fp32 whatever it is."""

    @property
    def device(self) -> torch.device:
        return next(self.blocks.parameters()).device

    @abstractmethod
    def prefix(self, *condition: Tensor) -> Prefix:
        """The condition -> first input and context, once per image."""

    @abstractmethod
    def layer_context(self, layer: int, context: Context) -> dict[str, Tensor]:
        """One layer's share of the context, as `blocks[layer]` takes it."""

    @abstractmethod
    def scale_constants(self, scale: int, following: int | None = None) -> dict[str, Tensor]:
        """The small tensors in which scales differ: resampling matrices, guidance, position terms, rope.

        fp32 and on `device`. `following` is the scale run next, by default the one after; behind the last scale what
        leads to a next input (`next_position` among it) is absent.
        """

    @abstractmethod
    def sample(self, logits: Tensor, noise: Tensor | None, constants: Constants) -> Tensor:
        """Guidance, filters and draw -> tokens `[B, N]` (bits: `[B, N, bits]`) int32.

        logits `[N, R, V]` fp32; noise `[N, B, V]` uniform fp32, or None to take the largest logit whatever `top_k` is.
        """

    @abstractmethod
    def accumulate(self, tokens: Tensor, codes: Tensor, constants: Constants) -> Tensor:
        """`codes [B, latent_channels, h, w]` fp32 plus the codes of this scale's tokens, as a new tensor."""

    @abstractmethod
    def next_input(self, codes: Tensor, constants: Constants) -> Tensor:
        """The input of the next scale, `[N', R, C]` fp32, from the accumulated codes."""

    def decode(self, codes: Tensor) -> Tensor:
        """`codes [B, latent_channels, h, w]` -> RGB `[B, 3, height, width]` fp32 in [0, 1].

        Without TF32, which in fp32 costs a pixel 1e-3.
        """
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return (self.vae.decode(codes) + 1) * 0.5

    def advance(
        self, logits: Tensor, noise: Tensor | None, codes: Tensor, constants: Constants
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From one scale to the next: `(tokens, codes, next_x)`; `next_x` is None behind the last scale."""
        tokens = self.sample(logits, noise, constants)
        codes = self.accumulate(tokens, codes, constants)
        next_x = self.next_input(codes, constants) if "next_position" in constants else None
        return tokens, codes, next_x

    def accumulate_vectors(self, vectors: Tensor, codes: Tensor, constants: Constants) -> Tensor:
        """`accumulate` of code vectors `[B, N, latent_channels]` that need not be of the codebook.

        InputError where the backbone has no codebook.
        """
        raise InputError(f"backbone '{self.spec.backbone}' has no codebook to mix: leave the mixture out")

    def initial_codes(self, images: int) -> Tensor:
        """Zeros `[B, latent_channels, h, w]` fp32."""
        return torch.zeros(images, self.spec.latent_channels, *self.spec.latent_grid, device=self.device)

    def noise_shape(self, scale: int, images: int) -> tuple[int, ...]:
        """Of the uniform noise that `sample` takes at a scale: `[N, B, V]`."""
        return (self.spec.tokens[scale], images, self.spec.vocab)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis, computed and returned in fp32 whatever the input is."""
    affine = [None if p is None else p.float() for p in (weight, bias)]
    return nn.functional.layer_norm(x.float(), (x.shape[-1],), affine[0], affine[1], eps)


def guide(logits: Tensor, weights: Tensor) -> Tensor:
    """Classifier-free guidance: `weights[0] * conditional + weights[1] * unconditional`, fp32.

    Args:
        logits: `[N, R, V]`, conditional rows first.
        weights: `[2]`, or `[1]` where only conditional rows run (R = B).

    Returns: `[N, B, V]`.
    """
    if weights.shape[0] == 1:
        return weights * logits
    images = logits.shape[1] // 2
    return weights[0] * logits[:, :images] + weights[1] * logits[:, images:]


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside top-k, then outside top-p, set to -inf; `[..., V]` fp32 in and out.

    Both filters are thresholds on the logit, so equal logits are kept or dropped together, and top-p sorts only the
    `top_k` survivors: TensorRT's TopK stops at 3840. Without top-k, top-p sorts all V.
    Source: FoundationVision/VAR models/helpers.py `sample_with_top_k_top_p_`.
    """
    vocab = logits.shape[-1]
    k = min(top_k, vocab) if top_k > 0 else vocab
    if k == vocab and top_p <= 0.0:
        return logits
    largest = torch.topk(logits, k, dim=-1, largest=True, sorted=True).values
    threshold = largest[..., -1:]
    if top_p > 0.0 and k > 1:
        ascending = largest.flip(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        # The largest is never dropped: the first k - 1 may go, and the threshold is the least that stays.
        lesser = ascending[..., :-1].masked_fill(dropped[..., :-1], float("inf")).amin(-1, keepdim=True)
        threshold = torch.minimum(lesser, ascending[..., -1:])
    return logits.masked_fill(logits < threshold, float("-inf"))


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel(0, 1) noise from uniform noise in the open interval (0, 1): `-log(-log u)`, same shape."""
    return -torch.log(-torch.log(uniform))


def restore_constants(spec: Spec, scale: int, cache_scale: int) -> tuple[Tensor, Tensor]:
    """Matrices that resize a span's cached change from the grid of `cache_scale` to that of `scale`, by area.

    Returns: rows `[h, hc]`, cols `[w, wc]`, fp32.
    """
    (h, w), (hc, wc) = spec.grids[scale], spec.grids[cache_scale]
    return area_matrix(h, hc), area_matrix(w, wc)
