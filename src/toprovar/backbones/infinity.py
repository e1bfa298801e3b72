"""Infinity: text-to-image by bitwise next-scale prediction.

What sets it apart from VAR: a token is d bits, each drawn by itself from two logits, so there is no codebook; the text
comes in by cross-attention in every block; positions are 2-D RoPE and one level embedding a scale; the six modulation
vectors of all blocks share one matrix and differ by a table each. The 8B model's token is a 2 x 2 patch of the code
map. Source: FoundationVision/Infinity infinity/models/infinity.py, basic.py, tools/run_infinity.py (commit 4c27bbb).

Parameters keep their original names, except that `block_chunks.{k}.module.{j}` (or `blocks.{i}`) is `blocks.{layer}`.
Cross-attention keys and values, modulation and everything else that depends on the prompt alone are computed once per
image in `prefix`; the original recomputes them at every scale.

Precision: the matrices of the blocks may be fp16 or bf16 (`set_precision`). The residual stream, norms, modulation, the
L2 norm and rotation of q and k, text projections, head, logits and codes are fp32 in any case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar.backbones.base import (
    Backbone,
    BlockOutput,
    Constants,
    Context,
    EntropyMode,
    Prefix,
    Sampling,
    Spec,
    guide,
    gumbel,
    layer_norm,
)
from toprovar.backbones.bsq_vae import VAE_WRAPPERS, BsqVae, load_bsq_vae
from toprovar.backbones.checkpoint import State, block_count, load_strict, read_state_dict, require_kind, shape_of
from toprovar.backbones.resample import bilinear_matrix, resample
from toprovar.backbones.schedules import Grid, rope_indices, schedule
from toprovar.errors import CheckpointError, InputError
from toprovar.kernels import entropy_attention

__all__ = [
    "CHECKPOINT_WRAPPERS",
    "RELEASED_SAMPLING",
    "Infinity",
    "InfinitySizes",
    "InfinitySpec",
    "load_infinity",
    "rope_table",
    "rotations",
    "text_bias",
]

_EPS = 1e-6
_MAX_LOG_SCALE = math.log(100.0)
# Finite, so that fp16 holds it and an engine needs no infinities; exp(-3e4 + anything a score can be) is exactly 0.
_MASKED = -3.0e4

RELEASED_SAMPLING = {
    1: Sampling(guidance=4.0, temperature=0.5, top_p=0.97),
    2: Sampling(guidance=3.0, temperature=1.0, top_p=0.97),
}
"""Patch size (1: 2B, 2: 8B) -> settings of the released scripts, whose top_k of 900 keeps both values of a bit."""


@dataclass(frozen=True)
class InfinitySpec(Spec):
    """Sizes of an Infinity checkpoint under one schedule, beyond those of `Spec`.

    Attributes:
        bits: of one token (d_in); `vocab` is twice that. With patches, bit 4c + 2y + x is channel c at (y, x).
        patch: 1, or 2 where a token is a 2 x 2 patch of the code map.
        text_width: channels of the text features.
        text_maximum_tokens: rows of the learned unconditional text, the longest prompt.
        pool_heads: of the attention that pools the text into one vector.
        levels: rows of the level embedding, at least the number of scales.
        rope_grid: (h, w) that RoPE positions are stretched to.
        level_starts: layers before which the level embedding is added *again* (the first of every chunk but the first;
            `add_lvl_embeding_only_first_block=0`). Empty in every release. The rope table then has one column more,
            the scale.
    """

    bits: int = 32
    patch: int = 1
    text_width: int = 2048
    text_maximum_tokens: int = 512
    pool_heads: int = 16
    levels: int = 15
    rope_grid: Grid = (64, 64)
    level_starts: tuple[int, ...] = ()


# ---------------------------------------------------------------------------------------------------- small pieces


def rope_table(grid: Grid, rope_grid: Grid, head_dim: int) -> Tensor:
    """`rotations` of a scale's positions, `[h*w, 1, 2 D]`.

    The first half of the pairs turns with the row, the other with the column. Frequencies are 10000^(-2j/(D/2)), j < D/4;
    positions are `rope_indices`, stretched to `rope_grid`.
    """
    half = head_dim // 2
    frequency = 1.0 / (10000.0 ** (torch.arange(0, half, 2).float() / half))
    rows, cols = (
        torch.outer(torch.tensor(rope_indices(n, full)).float(), frequency)
        for n, full in zip(grid, rope_grid, strict=True)
    )
    height, width = grid
    angles = torch.cat(
        [rows[:, None].expand(height, width, -1), cols[None, :].expand(height, width, -1)], dim=-1
    ).reshape(height * width, 1, half)
    return rotations(angles)


def rotations(angles: Tensor) -> Tensor:
    """Angles of the pairs of a head, `[..., D/2]` -> D cosines, then D sines, as `_rotate` takes them: `[..., 2 D]` fp32.

    Pair i is dims (2i, 2i+1): both have its cosine, the first its sine with the other sign.
    """
    sines = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(-2)
    return torch.cat([angles.cos().repeat_interleave(2, dim=-1), sines], dim=-1)


def text_bias(lengths: Tensor, tokens: int) -> Tensor:
    """What is added to the scores of text: lengths [R] -> `[R, T]` fp32, 0 for real tokens and -3e4 for padding."""
    real = torch.arange(tokens, device=lengths.device)[None] < lengths[:, None]
    return torch.where(real, 0.0, _MASKED)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention on padded text, softmax scale 1/sqrt(D): q [n,R,H,D], k and v [T,R,H,D], bias [R,T] -> [n,R,H,D]."""
    out = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        k.permute(1, 2, 0, 3),
        v.permute(1, 2, 0, 3),
        attn_mask=bias[:, None, None, :].to(q.dtype),
    )
    return out.permute(2, 0, 1, 3)


def _linear(x: Tensor, layer: nn.Linear, bias: Tensor | None = None) -> Tensor:
    """The layer in the dtype of its weight, whatever x is."""
    weight, bias = layer.weight, layer.bias if bias is None else bias
    rows, inputs = x[..., 0].numel(), x.shape[-1]
    if weight.is_cuda and weight.dtype == torch.float32 and 8 <= rows <= 1024 <= inputs and inputs % 8 == 0:
        # cuBLAS leaves most of a GPU idle over fp32 products of a text's size; eight parts of the sum take a tenth.
        flat = x.float().reshape(rows, 8, -1).transpose(0, 1)
        total = torch.bmm(flat, weight.view(weight.shape[0], 8, -1).permute(1, 2, 0)).sum(0).view(*x.shape[:-1], -1)
        return total if bias is None else total + bias
    return F.linear(x.to(weight.dtype), weight, bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs: x [n,R,H,D], cos and sin [n, 1 or R, 1, D] of `rotations`.

    A gather and products: taking pairs apart and together again is a dozen small kernels in an engine of TensorRT 8.6.
    """
    other = torch.arange(x.shape[-1], device=x.device).unflatten(0, (-1, 2)).flip(1).flatten()
    return x * cos + x.index_select(-1, other) * sin


class _SelfAttention(nn.Module):
    """Cosine attention: q and k are L2-normalised, q times a learned factor per head (at most 100), softmax scale 1."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.zero_k_bias: Tensor
        self.proj = nn.Linear(width, width)

    def multiplier(self) -> Tensor:
        """Factor of q, [H] fp32."""
        return self.scale_mul_1H11.float().clamp_max(_MAX_LOG_SCALE).exp().reshape(-1)

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n,R,C], rope [n, 1 or R, >= 2 D] -> q, k, v [n,R,H,D] in the dtype of the matrix."""
        product = _linear(x, self.mat_qkv, torch.cat([self.q_bias, self.zero_k_bias, self.v_bias]))
        q, k, v = product.unflatten(-1, (3, self.heads, -1)).unbind(2)
        width = q.shape[-1]
        cos, sin = rope[..., None, :width], rope[..., None, width : 2 * width]
        q = _rotate(F.normalize(q.float(), dim=-1, eps=1e-12) * self.multiplier()[:, None], cos, sin)
        k = _rotate(F.normalize(k.float(), dim=-1, eps=1e-12), cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v.contiguous()


class _CrossAttention(nn.Module):
    """Attention of image tokens to text: no cosine, no rotation. Keys and values come from `prefix`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.zero_k_bias: Tensor
        self.proj = nn.Linear(width, width)

    def kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [T,R,C] -> k, v [T,R,H,D] in the dtype of the matrix."""
        k, v = (
            _linear(text, self.mat_kv, torch.cat([self.zero_k_bias, self.v_bias]))
            .unflatten(-1, (2, self.heads, -1))
            .unbind(2)
        )
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """x [n,R,C], k and v [T,R,H,D], bias [R,T] -> [n,R,C]."""
        q = _linear(x, self.mat_q).unflatten(-1, (self.heads, -1))
        return _linear(masked_attention(q, k, v, bias).flatten(-2), self.proj)


class _TextPool(nn.Module):
    """One learned query attends to the text: the condition of the modulation, and the first token."""

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.mat_q = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, heads, width // heads), std=math.sqrt(1 / width / 3))
        )
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.zero_k_bias: Tensor
        self.proj = nn.Linear(width, width)

    def forward(self, text: Tensor, bias: Tensor) -> Tensor:
        """text [T,R,text_width], bias [R,T] -> [R,C] fp32."""
        heads = self.mat_q.shape[1]
        product = _linear(text, self.mat_kv, torch.cat([self.zero_k_bias, self.v_bias]))
        k, v = product.unflatten(-1, (2, heads, -1)).unbind(2)
        q = self.mat_q[None].to(k.dtype).expand(1, text.shape[1], -1, -1)
        return _linear(masked_attention(q, k, v, bias)[0].flatten(-2), self.proj).float()


class _Ffn(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(F.gelu(_linear(x, self.fc1), approximate="tanh"), self.fc2)


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, "Tensor | None"]]
TextKeys = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Text `[T, R, C]` -> cross_k, cross_v of all layers."""


class _Block(nn.Module):
    """Self-attention, cross-attention, FFN; the outer two modulated by the condition."""

    def __init__(self, spec: InfinitySpec) -> None:
        super().__init__()
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, spec.width) / spec.width**0.5)
        self.sa = _SelfAttention(spec.width, spec.heads)
        self.ca = _CrossAttention(spec.width, spec.heads)
        self.ca_norm = nn.LayerNorm(spec.width, eps=_EPS)
        self.ffn = _Ffn(spec.width, spec.ffn_width)

    def forward(
        self,
        x: Tensor,
        context: Context,
        past_k: Tensor,
        past_v: Tensor,
        rope: Tensor | None = None,
        entropy: EntropyMode = "none",
    ) -> BlockOutput:
        """One layer of one scale, as `Backbone.blocks` describes it; rope `[n, 1 or R, F]` is needed."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            output = entropy_attention(q, past_k, past_v, k, v, scale=1.0, entropy=entropy)
            return output.out, output.entropy

        return self.run(x, context, rope, attend)

    def run(self, x: Tensor, context: Context, rope: Tensor | None, attend: Attend) -> BlockOutput:
        """The layer around any self-attention; `attend(q, k, v) -> (out, entropy)`."""
        assert rope is not None
        gamma1, gamma2, scale1, scale2, shift1, shift2 = context["modulation"].unbind(0)
        if "levels" in context:
            x = x + context["levels"].float()[rope[..., -1].long()]
        q, k, v = self.sa.qkv(layer_norm(x, eps=_EPS) * (1 + scale1) + shift1, rope)
        out, entropy = attend(q, k, v)
        x = x + _linear(out.flatten(-2), self.sa.proj).float() * gamma1
        text = layer_norm(x, self.ca_norm.weight, self.ca_norm.bias, _EPS)
        x = x + self.ca(text, context["cross_k"], context["cross_v"], context["text_bias"]).float()
        x = x + self.ffn(layer_norm(x, eps=_EPS) * (1 + scale2) + shift2).float() * gamma2
        return BlockOutput(x, k, v, entropy)


# ------------------------------------------------------------------------------------------------------- the model


class _HeadNorm(nn.Module):
    """Holds the matrix of the head's modulation under its original name, `head_nm.ada_lin.1`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class _Pooled(nn.Module):
    """Holds the text pooling under its original name, `text_proj_for_sos.ca`."""

    def __init__(self, spec: InfinitySpec) -> None:
        super().__init__()
        self.ca = _TextPool(spec.text_width, spec.width, spec.pool_heads)


class _TextNorm(nn.Module):
    """RMSNorm with a weight, in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * self.weight.float()


class Infinity(Backbone):
    """The transformer and its VAE, for one schedule.

    Args:
        spec: sizes and grids.
        vae: its decoder makes the pictures.
        sampling: how bits are drawn; the released settings by default.

    Raises:
        InputError: a schedule that does not begin with 1 x 1, has more scales than level embeddings, or a VAE of
            another number of latent channels.
    """

    spec: InfinitySpec
    vae: BsqVae

    def __init__(self, spec: InfinitySpec, vae: BsqVae, sampling: Sampling | None = None) -> None:
        super().__init__()
        if spec.grids[0] != (1, 1):
            raise InputError(f"schedule begins with the grid {spec.grids[0]}: Infinity's first scale is 1 x 1")
        if spec.scales > spec.levels:
            raise InputError(f"schedule of {spec.scales} scales: the checkpoint has level embeddings for {spec.levels}")
        if vae.spec.latent_channels * spec.patch**2 != spec.bits:
            raise InputError(
                f"VAE of {vae.spec.latent_channels} latent channels for a transformer of {spec.bits} bits a token: "
                f"with {spec.patch} x {spec.patch} patches it needs {spec.bits // spec.patch**2}"
            )
        width = spec.width
        std = math.sqrt(1 / width / 3)
        self.spec = spec
        self.sampling = RELEASED_SAMPLING[spec.patch] if sampling is None else sampling
        self.cfg_uncond = nn.Parameter(unconditional_text(spec.text_maximum_tokens, spec.text_width))
        self.pos_start = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=std))
        self.text_norm = _TextNorm(spec.text_width)
        self.text_proj_for_sos = _Pooled(spec)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(spec.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.lvl_embed = nn.Embedding(spec.levels, width)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=std)
        self.word_embed = nn.Linear(spec.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.head_nm = _HeadNorm(width)
        self.blocks = nn.ModuleList(_Block(spec) for _ in range(spec.depth))
        # What the file calls `head` is the method `head` here; `read_sizes` renames it.
        self.head_linear = nn.Linear(width, spec.vocab)
        self.vae = vae

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks' matrices, and so of keys and values."""
        return cast(_Block, self.blocks[0]).sa.mat_qkv.weight.dtype

    def set_precision(self, dtype: torch.dtype, *, decoder: torch.dtype | None = None) -> Infinity:
        """Casts the matrices of the blocks (and the decoder if asked) in place; tables, factors and norms stay fp32."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if _is_matrix(name):
                tensor.data = tensor.data.to(dtype)
        if decoder is not None:
            self.vae.to(decoder)
        return self

    # -- text ---------------------------------------------------------------------------------------------------

    def text_rows(
        self, text: Tensor, lengths: Tensor, negative: Tensor | None = None, negative_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features and lengths of all rows: `[R, T, text_width]`, `[R]`; see `prefix`.

        The unconditional row of an image is its negative prompt, or as many rows of the learned text as the prompt has.
        """
        lengths = lengths.to(torch.int64)
        if not self.sampling.guided:
            return text.float(), lengths
        if negative is None:
            learned = self.cfg_uncond[: text.shape[1]].float().expand(text.shape[0], -1, -1)
            return torch.cat([text.float(), learned]), torch.cat([lengths, lengths])
        assert negative_lengths is not None
        tokens = max(text.shape[1], negative.shape[1])
        text, negative = (F.pad(t.float(), (0, 0, 0, tokens - t.shape[1])) for t in (text, negative))
        negative_lengths = negative_lengths.to(torch.int64)
        given = negative_lengths > 0
        learned = F.pad(self.cfg_uncond.float(), (0, 0, 0, max(0, tokens - self.cfg_uncond.shape[0])))[:tokens]
        unconditional = torch.where(given[:, None, None], negative, learned)
        return torch.cat([text, unconditional]), torch.cat([lengths, torch.where(given, negative_lengths, lengths)])

    def condition(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of text -> pooled condition `[R, C]`, cross-attention source `[T, R, C]`, bias `[R, T]`; all fp32."""
        tokens = text.shape[1]
        bias = text_bias(lengths, tokens)
        # Whatever stands in the padding must not reach a sum: 0 * NaN is NaN.
        text = torch.where((bias == 0.0)[..., None], text, 0.0)
        normed = self.text_norm(text.transpose(0, 1))
        pooled = self.text_proj_for_sos.ca(normed, bias)
        first, gelu, second = self.text_proj_for_ca
        source = _linear(gelu(_linear(normed, cast(nn.Linear, first))), cast(nn.Linear, second))
        return pooled, source.float(), bias

    def context(
        self, pooled: Tensor, source: Tensor, bias: Tensor, text_keys: TextKeys | None = None
    ) -> dict[str, Tensor]:
        """What every scale needs of the condition; `text_keys` computes keys and values in another way.

        modulation `[depth, 6, R, C]` (gamma1, gamma2, scale1, scale2, shift1, shift2) and head_modulation `[2, R, C]`
        (scale, shift) fp32; cross_k, cross_v `[depth, T, R, H, D]` in the blocks' dtype; text_bias `[R, T]` fp32.
        """
        blocks = cast("Sequence[_Block]", self.blocks)
        active = F.silu(pooled)
        shared = _linear(active, cast(nn.Linear, self.shared_ada_lin[1])).float().unflatten(-1, (6, -1)).transpose(0, 1)
        tables = torch.stack([block.ada_gss[0, 0].float() for block in blocks])
        head = _linear(active, cast(nn.Linear, self.head_nm.ada_lin[1])).float().unflatten(-1, (2, -1)).transpose(0, 1)
        if text_keys is None:
            keys, values = map(torch.stack, zip(*(block.ca.kv(source) for block in blocks), strict=True))
        else:
            keys, values = text_keys(source)
        return {
            "modulation": tables[:, :, None] + shared,
            "head_modulation": head,
            "cross_k": keys,
            "cross_v": values,
            "text_bias": bias,
        }

    def prefix(self, *condition: Tensor, text_keys: TextKeys | None = None) -> Prefix:
        """Text -> first input and context.

        Args:
            condition: text_features `[B, T, text_width]` and text_lengths `[B]`, 1..T (what stands in the padding does
                not matter); then, if wanted, negative prompts the same way, with their own T. A negative length of 0
                means none for that image: the learned unconditional text.

        Returns: x0 `[1, R, C]`; the context of `context`, with T the longer of the two.

        Raises:
            InputError: another number of tensors, another width, or more tokens than the learned text has.
        """
        if len(condition) not in (2, 4):
            raise InputError(
                f"prefix takes features and lengths of the text, and of a negative one if wanted: {len(condition)} "
                "tensors were given instead of 2 or 4"
            )
        text = condition[0]
        if text.dim() != 3 or text.shape[2] != self.spec.text_width:
            raise InputError(f"text features {list(text.shape)}: expected [B, T, {self.spec.text_width}]")
        if self.sampling.guided and len(condition) == 2 and text.shape[1] > self.spec.text_maximum_tokens:
            raise InputError(
                f"text of {text.shape[1]} tokens: the checkpoint's learned unconditional text has "
                f"{self.spec.text_maximum_tokens}; shorten the prompt or give a negative one"
            )
        pooled, source, bias = self.condition(*self.text_rows(*condition))
        x0 = (pooled + self.pos_start[0].float() + self.lvl_embed.weight[0].float())[None]
        return Prefix(x0, self.context(pooled, source, bias, text_keys))

    # -- one scale ----------------------------------------------------------------------------------------------

    def layer_context(self, layer: int, context: Context) -> dict[str, Tensor]:
        share = {name: context[name][layer] for name in ("modulation", "cross_k", "cross_v")}
        share["text_bias"] = context["text_bias"]
        if layer in self.spec.level_starts:
            share["levels"] = self.lvl_embed.weight
        return share

    def head(self, x: Tensor, context: Context) -> Tensor:
        scale, shift = context["head_modulation"].unbind(0)
        return _linear(layer_norm(x, eps=_EPS) * (1 + scale) + shift, self.head_linear).float()

    def rope(self, scale: int) -> Tensor:
        """The rope table of a scale, `[N, 1, F]`; its last column is the scale where blocks ask for it."""
        table = rope_table(self.spec.grids[scale], self.spec.rope_grid, self.spec.head_dim)
        if self.spec.level_starts:
            table = F.pad(table, (0, 1), value=float(scale))
        return table

    def scale_constants(self, scale: int, following: int | None = None) -> dict[str, Tensor]:
        """rope `[N, 1, F]`; guidance `[2]` (or `[1]`), temperature included; up_rows `[H, h, p]`, up_cols `[W, w, p]`:
        from the scale's p*h x p*w codes to the latent grid H x W; and, where a scale follows, down_rows `[h', p, H]`,
        down_cols `[w', p, W]`, next_position `[1, 1, C]` (its level embedding). The patch p has an axis of its own, so
        that a graph knows p*h for a multiple of p."""
        spec = self.spec
        following = scale + 1 if following is None else following
        (height, width), (h, w) = spec.latent_grid, spec.grids[scale]
        strength = self.sampling.at("guidance", scale)
        weights = [strength, 1.0 - strength] if self.sampling.guided else [1.0]
        constants = {
            "rope": self.rope(scale),
            "guidance": torch.tensor(weights) / self.sampling.at("temperature", scale),
            "up_rows": bilinear_matrix(height, spec.patch * h).unflatten(1, (h, spec.patch)),
            "up_cols": bilinear_matrix(width, spec.patch * w).unflatten(1, (w, spec.patch)),
        }
        if following < spec.scales:
            h, w = spec.grids[following]
            constants["down_rows"] = bilinear_matrix(spec.patch * h, height).unflatten(0, (h, spec.patch))
            constants["down_cols"] = bilinear_matrix(spec.patch * w, width).unflatten(0, (w, spec.patch))
            constants["next_position"] = self.lvl_embed.weight[following].detach().float()[None, None]
        return {name: value.to(self.device, torch.float32) for name, value in constants.items()}

    def sample(self, logits: Tensor, noise: Tensor | None, constants: Constants) -> Tensor:
        """Draws every bit by itself -> `[B, N, bits]` int32.

        Channel 2j + b is the logit of bit j being b. A bit is 1 where logit plus Gumbel noise is greater for 1 than for
        0, and greedy where the filters leave one value: `top_k=1`, or a lesser probability of at most 1 - `top_p` (the
        original's filter on two logits). Equal logits without noise give 0.
        """
        zero, one = guide(logits, constants["guidance"]).unflatten(-1, (-1, 2)).unbind(-1)
        difference = one - zero
        drawn = difference
        if noise is not None and self.sampling.top_k != 1:
            noise_zero, noise_one = gumbel(noise).unflatten(-1, (-1, 2)).unbind(-1)
            drawn = difference + (noise_one - noise_zero)
            if self.sampling.top_p > 0:
                certain = torch.sigmoid(-difference.abs()) <= 1.0 - self.sampling.top_p
                drawn = torch.where(certain, difference, drawn)
        return (drawn > 0).to(torch.int32).transpose(0, 1)

    def bits_to_codes(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Bits `[B, N, bits]` of a scale of `grid` -> codes `[B, d, p*h, p*w]` fp32, +-1/sqrt(d)."""
        magnitude = self.spec.latent_channels**-0.5
        codes = tokens.to(torch.float32) * (2 * magnitude) - magnitude
        # Bit 4c + 2y + x is channel c at (y, x) of the patch: just what a pixel shuffle undoes.
        maps = codes.transpose(1, 2).unflatten(2, grid)
        return maps if self.spec.patch == 1 else F.pixel_shuffle(maps, self.spec.patch)

    def bits_to_tokens(self, bits: Tensor) -> Tensor:
        """Bits of a latent grid `[B, p*h, p*w, d]` (`BitQuantizer`) -> tokens `[B, N, bits]`."""
        patch = self.spec.patch
        images, height, width, channels = bits.shape
        cells = bits.reshape(images, height // patch, patch, width // patch, patch, channels).permute(0, 1, 3, 5, 2, 4)
        return cells.reshape(images, -1, self.spec.bits)

    def accumulate(self, tokens: Tensor, codes: Tensor, constants: Constants) -> Tensor:
        rows, cols = constants["up_rows"], constants["up_cols"]
        maps = self.bits_to_codes(tokens, (rows.shape[1], cols.shape[1]))
        return codes + resample(maps, rows.flatten(1), cols.flatten(1), "bilinear")

    def next_words(self, codes: Tensor, constants: Constants) -> Tensor:
        """What `word_embed` takes at the next scale: accumulated codes `[B, d, H, W]` -> `[N', B, bits]`."""
        rows, cols = constants["down_rows"], constants["down_cols"]
        maps = resample(codes, rows.flatten(0, 1), cols.flatten(0, 1), "bilinear")
        return self._words(maps, (rows.shape[0], cols.shape[0]))

    def _words(self, maps: Tensor, grid: Grid) -> Tensor:
        """`[B, d, p*h, p*w]` -> `[N, B, bits]`."""
        if self.spec.patch > 1:
            maps = F.pixel_unshuffle(maps, self.spec.patch)
        return maps.permute(2, 3, 0, 1).reshape(grid[0] * grid[1], maps.shape[0], self.spec.bits)

    def next_input(self, codes: Tensor, constants: Constants) -> Tensor:
        x = _linear(self.next_words(codes, constants), self.word_embed).float() + constants["next_position"]
        return torch.cat([x] * self.branches, dim=1)

    def training_inputs(self, maps: Sequence[Tensor]) -> Tensor:
        """`MultiScaleBits.inputs` (`[B, d, p*h, p*w]` a scale from the second on) -> `inputs` of `forward_training`."""
        patch = self.spec.patch
        words = [self._words(m, (m.shape[2] // patch, m.shape[3] // patch)) for m in maps]
        return torch.cat(words).transpose(0, 1)

    # -- training -----------------------------------------------------------------------------------------------

    def forward_training(
        self, text: Tensor, lengths: Tensor, inputs: Tensor, *, drop: Tensor | None = None, scales: int | None = None
    ) -> Tensor:
        """Logits of all scales in one pass under a block-causal mask: scale s sees the scales up to itself.

        Args:
            text: features `[B, T, text_width]`.
            lengths: `[B]`.
            inputs: what `word_embed` takes, `[B, L - 1, bits]`: `training_inputs` of what the VAE's quantiser gives.
            drop: `[B]` bool, images whose text is replaced by the learned unconditional one.
            scales: how many of the schedule's scales L counts; all by default.

        Returns: logits `[B, L, V]` fp32 before temperature.
        """
        spec = self.spec
        count = spec.scales if scales is None else scales
        sizes = spec.tokens[:count]
        if inputs.shape[1:] != (sum(sizes) - 1, spec.bits):
            raise InputError(
                f"inputs {list(inputs.shape)}: expected [B, {sum(sizes) - 1}, {spec.bits}] for {count} scales"
            )
        if drop is not None:
            text = torch.where(drop[:, None, None], self.cfg_uncond[: text.shape[1]].float(), text.float())
        pooled, source, bias = self.condition(text.float(), lengths.to(torch.int64))
        context = self.context(pooled, source, bias)

        device = inputs.device
        level = torch.repeat_interleave(torch.arange(count, device=device), torch.tensor(sizes, device=device))
        mask = level[:, None] >= level[None, :]
        rope = torch.cat([self.rope(s) for s in range(count)]).to(device)
        first = (pooled + self.pos_start[0].float())[None]
        x = torch.cat([first, _linear(inputs.transpose(0, 1), self.word_embed).float()])
        x = x + self.lvl_embed(level).float()[:, None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
            return out.permute(2, 0, 1, 3), None

        for layer, block in enumerate(cast("Sequence[_Block]", self.blocks)):
            x = block.run(x, self.layer_context(layer, context), rope, attend).x
        return self.head(x, context).transpose(0, 1)


# ----------------------------------------------------------------------------------------------------- checkpoints


def unconditional_text(tokens: int, width: int) -> Tensor:
    """The learned unconditional text before any training: `[tokens, width]`, the same at every start (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    values = nn.init.trunc_normal_(torch.empty(tokens, width, device="cpu"), std=1.2, generator=generator) / width**0.5
    return values.to(torch.get_default_device())


@dataclass(frozen=True)
class InfinitySizes:
    """What the shapes in an Infinity checkpoint tell, before a schedule is chosen."""

    depth: int
    width: int
    heads: int
    ffn_width: int
    bits: int
    text_width: int
    text_maximum_tokens: int
    pool_heads: int
    levels: int
    chunks: int

    def spec(
        self,
        vae: BsqVae,
        grids: Sequence[Grid],
        rope_grid: Grid,
        *,
        level_every_chunk: bool = False,
        text_maximum_tokens: int | None = None,
    ) -> InfinitySpec:
        """The spec under a schedule. `level_every_chunk` is the original's `add_lvl_embeding_only_first_block=0`."""
        channels = vae.spec.latent_channels
        if self.bits not in (channels, 4 * channels):
            raise CheckpointError(
                f"the transformer writes {self.bits} bits a token and the VAE has {channels} latent channels: it needs "
                f"{self.bits}, or {self.bits // 4} with 2 x 2 patches; infinity_vae_d32reg.pth belongs to the 2B "
                "model, infinity_vae_d56_f8_14_patchify.pth to the 8B models"
            )
        patch = 1 if self.bits == channels else 2
        height, width = (n * patch for n in grids[-1])
        starts = (
            tuple(range(self.depth // self.chunks, self.depth, self.depth // self.chunks)) if level_every_chunk else ()
        )
        head_dim = self.width // self.heads
        return InfinitySpec(
            backbone="infinity",
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            head_dim=head_dim,
            ffn_width=self.ffn_width,
            vocab=2 * self.bits,
            grids=tuple((h, w) for h, w in grids),
            latent_channels=channels,
            latent_grid=(height, width),
            image_size=(height * vae.spec.stride, width * vae.spec.stride),
            attention_scale=1.0,
            rope_width=2 * head_dim + (1 if starts else 0),
            bits=self.bits,
            patch=patch,
            text_width=self.text_width,
            text_maximum_tokens=text_maximum_tokens or self.text_maximum_tokens,
            pool_heads=self.pool_heads,
            levels=self.levels,
            rope_grid=rope_grid,
            level_starts=starts,
        )


_MATRIX = re.compile(r"^blocks\.\d+\.(sa|ca|ffn)\.(?!scale_mul_1H11$)")


def _is_matrix(name: str) -> bool:
    """Of the tensors that `set_precision` casts: the blocks' matrices and their biases."""
    return _MATRIX.match(name) is not None


_CHUNK = re.compile(r"^block_chunks\.(\d+)\.module\.(\d+)\.")
_LEGACY = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")

CHECKPOINT_WRAPPERS = (("trainer", "gpt_fsdp"), ("gpt_fsdp",))
"""Where a training checkpoint nests the transformer's tensors."""


def ignorable(key: str) -> bool:
    """Keys of older files that were buffers of the training code."""
    return key in _LEGACY


def read_sizes(state: State, path: str | Path) -> InfinitySizes:
    """Gives `state` the names used here and reads the sizes from its shapes.

    `block_chunks.{k}.module.{j}.` becomes `blocks.{layer}.`; `head.` becomes `head_linear.`; `scale_mul_1H11` as the
    customised flash attention stores it, (1, 1, H, 1), is reshaped.

    Raises:
        CheckpointError: not an Infinity transformer, or chunks of unequal length.
    """
    require_kind(state, "infinity", path)
    per_chunk: dict[int, int] = {}
    for key in state:
        if match := _CHUNK.match(key):
            chunk, index = int(match[1]), int(match[2])
            per_chunk[chunk] = max(per_chunk.get(chunk, 0), index + 1)
    if len(set(per_chunk.values())) > 1 or sorted(per_chunk) != list(range(len(per_chunk))):
        raise CheckpointError(f"{path}: block_chunks (chunk: blocks) are {per_chunk}: every chunk must hold as many")
    length = per_chunk.get(0, 0)
    for key in list(state):
        name = _CHUNK.sub(lambda match: f"blocks.{int(match[1]) * length + int(match[2])}.", key)
        if name.startswith("head."):
            name = "head_linear." + name.removeprefix("head.")
        value = state.pop(key)
        if name.endswith(".sa.scale_mul_1H11") and value.dim() == 4:
            value = value.reshape(1, -1, 1, 1)
        state[name] = value

    hidden, width = shape_of(state, "blocks.0.ffn.fc1.weight", path, 2)
    maximum, text_width = shape_of(state, "cfg_uncond", path, 2)
    return InfinitySizes(
        depth=block_count(state, r"blocks\.(\d+)\."),
        width=width,
        heads=shape_of(state, "blocks.0.sa.scale_mul_1H11", path, 4)[1],
        ffn_width=hidden,
        bits=shape_of(state, "word_embed.weight", path, 2)[1],
        text_width=text_width,
        text_maximum_tokens=maximum,
        pool_heads=shape_of(state, "text_proj_for_sos.ca.mat_q", path, 3)[1],
        levels=shape_of(state, "lvl_embed.weight", path, 2)[0],
        chunks=max(len(per_chunk), 1),
    )


def fit_unconditional_text(state: State, tokens: int) -> None:
    """Cuts `cfg_uncond` to `tokens` rows, or fills it up with what it was before training, as the original does."""
    learned = state["cfg_uncond"]
    if learned.shape[0] < tokens:
        start = unconditional_text(tokens, learned.shape[1]).to(learned)
        learned = torch.cat([learned, start[learned.shape[0] :]])
    state["cfg_uncond"] = learned[:tokens]


def build_infinity(
    state: State,
    path: str | Path,
    vae: BsqVae,
    *,
    grids: Sequence[Grid],
    rope_grid: Grid,
    sampling: Sampling | None = None,
    level_every_chunk: bool = False,
    text_maximum_tokens: int | None = None,
) -> Infinity:
    """A model of the sizes found in `state`, on the meta device but for `vae`; `state` gets the names used here.

    Args:
        grids: token grids of all scales.
        rope_grid: that RoPE positions are stretched to.
        sampling, level_every_chunk, text_maximum_tokens: see `load_infinity`.
    """
    sizes = read_sizes(state, path)
    if text_maximum_tokens is not None:
        fit_unconditional_text(state, text_maximum_tokens)
    spec = sizes.spec(
        vae, grids, rope_grid, level_every_chunk=level_every_chunk, text_maximum_tokens=text_maximum_tokens
    )
    with torch.device("meta"):
        return Infinity(spec, vae, sampling)


def load_infinity(
    checkpoint: str | Path,
    vae: str | Path,
    *,
    aspect: str | float = "1.0",
    resolution: str = "1M",
    grids: Sequence[Grid] | None = None,
    rope_grid: Grid | None = None,
    sampling: Sampling | None = None,
    level_every_chunk: bool = False,
    text_maximum_tokens: int | None = None,
    encoder: bool = False,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Infinity:
    """Loads a released or trained checkpoint and its VAE, in evaluation mode; every key must be accounted for.

    Args:
        checkpoint: `infinity_2b_reg.pth`, the folder or index of the sharded 8B weights, a training checkpoint.
        vae: `infinity_vae_d32reg.pth` (2B) or `infinity_vae_d56_f8_14_patchify.pth` (8B).
        aspect, resolution: height / width and size, see `schedules.schedule`; a checkpoint holds no schedule.
        grids, rope_grid: a schedule of one's own instead, both or neither.
        sampling: the released settings of the model's size by default.
        level_every_chunk: the original's `add_lvl_embeding_only_first_block=0`; 1 in every release.
        text_maximum_tokens: cuts or fills up the learned unconditional text; as in the file by default.
        encoder: keep the VAE's encoder, which only training needs.
        dtype: of the blocks' matrices (`Infinity.set_precision`); the rest of the transformer is fp32.
        vae_dtype: of the VAE.

    Raises:
        InputError: an unknown aspect ratio or resolution.
        CheckpointError: a file that is missing, truncated, unsafe, of another model, or incomplete; two files that do
            not belong together.
    """
    if (grids is None) != (rope_grid is None):
        raise InputError("grids and rope_grid: give both, or neither for a schedule of the original")
    if grids is None or rope_grid is None:
        chosen = schedule(aspect, resolution)
        grids, rope_grid = chosen.grids, chosen.rope_grid
    state = read_state_dict(checkpoint, CHECKPOINT_WRAPPERS)
    tokenizer = load_bsq_vae(read_state_dict(vae, VAE_WRAPPERS), vae, encoder=encoder, dtype=vae_dtype, device=device)
    model = build_infinity(
        state,
        checkpoint,
        tokenizer,
        grids=grids,
        rope_grid=rope_grid,
        sampling=sampling,
        level_every_chunk=level_every_chunk,
        text_maximum_tokens=text_maximum_tokens,
    )
    load_strict(
        model,
        state,
        checkpoint,
        ignore=ignorable,
        elsewhere=("vae.",),
        dtype=lambda name: dtype if _is_matrix(name) else torch.float32,
        device=device,
    )
    return model.eval().requires_grad_(False)
