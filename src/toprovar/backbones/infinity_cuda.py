"""Infinity's scale for a CUDA GPU: the arithmetic of `infinity._Block`, arranged so that every tensor is moved once.

`Step` runs a block as it reads on paper: some thirty kernels a layer. Here a layer is six matrix products, two attentions
and four fused kernels (`toprovar.kernels.fused`):

* a residual addition waits for the norm behind it, also across layers, and is done with it in one pass;
* q and k are normalised and rotated, and k and v stored in the cache, straight from the QKV product;
* a short text is folded into the two products around cross-attention (`FoldedText`);
* bias and GELU are the epilogue of the first FFN product;
* where rows are few, products leave the sum of their parts to the kernel behind them (`toprovar.kernels.linear`);
* our kernels are set up while the one before them still runs, and ask for the weights of the product behind them.

All sizes are fixed when a `ScaleRun` is made, nothing is allocated that outlives a call but its outputs, and nothing is read
back to the host, so a scale can be captured as one CUDA graph. The reference is `Step`; a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar.backbones.base import Context, restore_constants
from toprovar.backbones.infinity import Infinity, _Block
from toprovar.backbones.step import Step
from toprovar.errors import InputError
from toprovar.kernels import entropy_attention, gather_tokens, restore_tokens, scatter_tokens, select_tokens
from toprovar.kernels.fused import add_parts, qk_norm_rope, residual_norm, text_attention, text_softmax
from toprovar.kernels.linear import THIN_ROWS, thin_linear

__all__ = ["FoldedText", "FusedStep", "KeyValueCache", "ScaleRun", "TextKeys", "scale_runs"]

FOLDED_TOKENS = 144
"""Least tokens of a scale that reads the text through `FoldedText`; with fewer, its matrices are read for too little."""


@dataclass(frozen=True)
class ScaleRun:
    """One turn of the loop with all its sizes: what a plan says of a scale, and the tensors that go with it.

    Attributes:
        scale: index in the schedule.
        tokens, keep: N and K; K = N is a dense scale, which selects nothing.
        past_global, past_detail: keys in the cache before this scale, of global and of detail layers.
        cos, sin: ``[N, 1, D / 2]`` fp32, contiguous.
        keep_slots: ``[K]`` int32 on the device.
        area_rows, area_cols: from the cached grid to this one, or None.
        capture: this dense scale fills the restore cache.
        last: nothing reads this scale's keys and values later.
    """

    scale: int
    tokens: int
    keep: int
    past_global: int
    past_detail: int
    cos: Tensor
    sin: Tensor
    keep_slots: Tensor
    area_rows: Tensor | None
    area_cols: Tensor | None
    capture: bool
    last: bool

    @property
    def pruned(self) -> bool:
        return self.keep < self.tokens


def scale_runs(
    backbone: Infinity, keep: Sequence[int], scales: Sequence[int], cache_scale: int | None
) -> tuple[ScaleRun, ...]:
    """The loop over `scales` keeping ``keep[s]`` tokens of scale s in detail layers."""
    spec, device = backbone.spec, backbone.device
    runs = []
    past_global = past_detail = 0
    for scale in scales:
        width = spec.head_dim
        rope = backbone.rope(scale).to(device)
        tokens, kept = spec.tokens[scale], keep[scale]
        area: tuple[Tensor | None, Tensor | None] = (None, None)
        if kept < tokens and cache_scale is not None:
            rows, cols = restore_constants(spec, scale, cache_scale)
            area = rows.to(device), cols.to(device)
        runs.append(
            ScaleRun(
                scale,
                tokens,
                kept,
                past_global,
                past_detail,
                rope[..., 0:width:2].contiguous(),  # the kernel takes one of each pair
                rope[..., width + 1 : 2 * width : 2].contiguous(),
                torch.zeros(kept, dtype=torch.int32, device=device),
                *area,
                capture=scale == cache_scale,
                last=scale == scales[-1],
            )
        )
        past_global += tokens
        past_detail += kept
    return tuple(runs)


class KeyValueCache:
    """Keys and values of all layers, ``[P, R, H, D]`` each, allocated once.

    The last scale's, two fifths of all, are read by their own layer only, so all layers share one place for them.
    """

    def __init__(self, backbone: Infinity, roles: str, rows: int, runs: Sequence[ScaleRun]) -> None:
        spec, last = backbone.spec, runs[-1]

        def pair(tokens: int) -> tuple[Tensor, Tensor]:
            shape = tokens, rows, spec.heads, spec.head_dim
            k, v = (torch.empty(shape, dtype=backbone.dtype, device=backbone.device) for _ in range(2))
            return k, v

        self._past = [pair(last.past_global if role == "g" else last.past_detail) for role in roles]
        self._last = pair(last.tokens)
        self._roles = roles

    def pieces(self, layer: int, run: ScaleRun, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """past_k, past_v, and where the new keys and values of so many tokens are to be written."""
        start = run.past_global if self._roles[layer] == "g" else run.past_detail
        (keys, values), (new_k, new_v) = self._past[layer], self._last
        if run.last:
            return keys[:start], values[:start], new_k[:tokens], new_v[:tokens]
        end = start + tokens
        return keys[:start], values[:start], keys[start:end], values[start:end]

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in (*self._past, self._last) for t in pair)


class _Layer:
    """The tensors of one block as the products take them."""

    def __init__(self, block: _Block) -> None:
        sa, ca, ffn = block.sa, block.ca, block.ffn
        self.qkv = sa.mat_qkv.weight
        self.qkv_bias = torch.cat([sa.q_bias, sa.zero_k_bias, sa.v_bias])
        self.multiplier = sa.multiplier()
        self.sa_proj = sa.proj
        self.ca_norm = block.ca_norm
        self.ca_q, self.ca_proj = ca.mat_q, ca.proj
        self.fc1, self.fc2 = ffn.fc1, ffn.fc2


@dataclass
class _Stream:
    """The residual stream with the last branch not yet added: ``x + gamma * (branch + bias)``."""

    x: Tensor  # [n, R, C] fp32
    branch: Tensor | None = None  # [n, R, C], or fp32 parts of it [parts, n, R, C]
    bias: Tensor | None = None  # [C]
    gamma: Tensor | None = None  # [R, C]

    def normed(self, scale: Tensor, shift: Tensor, following: Tensor, *, affine: bool = False) -> Tensor:
        """Adds the branch in place and returns the modulated norm of the sum, for the product with these weights."""
        self.x, out = residual_norm(
            self.x,
            self.branch,
            self.gamma,
            scale,
            shift,
            bias=self.bias,
            dtype=following.dtype,
            affine=affine,
            following=following,
        )
        self.branch = self.bias = self.gamma = None
        assert out is not None
        return out

    def settle(self) -> Tensor:
        """Adds the branch in place."""
        if self.branch is not None:
            self.x, _ = residual_norm(self.x, self.branch, self.gamma, bias=self.bias)
            self.branch = self.bias = self.gamma = None
        return self.x


class TextKeys:
    """Keys and values of the text for all layers in one batched product.

    The layers' matrices are laid behind each other, and the layers' own parameters become views of that.
    """

    def __init__(self, backbone: Infinity) -> None:
        self._shape = backbone.spec.heads, backbone.spec.head_dim
        attentions = [block.ca for block in cast("Sequence[_Block]", backbone.blocks)]
        together = _behind_each_other([ca.mat_kv.weight.detach() for ca in attentions])  # [depth, 2 C, C]
        for ca, weight in zip(attentions, together, strict=True):
            ca.mat_kv.weight.data = weight
        depth, _, width = together.shape
        self._weights = together.view(2 * depth, width, width).mT
        self._biases = torch.stack([torch.stack([ca.zero_k_bias, ca.v_bias]) for ca in attentions]).view(-1, 1, width)

    def __call__(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Text ``[T, R, C]`` -> cross_k, cross_v ``[depth, T, R, H, D]``, as in `Infinity.context`; each layer dense."""
        tokens, rows, _ = source.shape
        flat = source.to(self._weights.dtype).flatten(0, 1).expand(len(self._weights), -1, -1)
        both = torch.baddbmm(self._biases, flat, self._weights).view(-1, 2, tokens, rows, *self._shape)
        return both[:, 0], both[:, 1]


class FoldedText:
    """Cross-attention as two products with matrices made of the text: ``softmax(x M + b) O`` in place of q, scores, output.

    M = Wq^T K^T and O = V Wo^T of every head, H T columns in place of the C that a layer's own matrices have. So it pays
    where T is below the head's size, once a picture. The sums are those of `Infinity`, in another order.

    Args:
        backbone: its matrices in half precision.
        rows: R.
        tokens: T.
    """

    def __init__(self, backbone: Infinity, rows: int, tokens: int) -> None:
        spec = backbone.spec
        self._attentions = [block.ca for block in cast("Sequence[_Block]", backbone.blocks)]
        self._heads, self._dim, self._width = spec.heads, spec.head_dim, spec.width
        shape = spec.depth, rows, spec.heads * tokens, spec.width
        self._into, self._out_of = (torch.empty(shape, dtype=backbone.dtype, device=backbone.device) for _ in range(2))
        self._biases = torch.stack([ca.mat_q.bias.detach().float() for ca in self._attentions])

    @staticmethod
    def pays(backbone: Infinity, tokens: int, runs: Sequence[ScaleRun]) -> bool:
        """Whether a text of so many tokens leaves products smaller than the layers' own, and some scale has use for them."""
        return tokens < backbone.spec.head_dim and any(run.tokens >= FOLDED_TOKENS for run in runs)

    def __call__(self, context: Context) -> dict[str, Tensor]:
        """text_into, text_out_of ``[depth, R, H T, C]`` and text_scores ``[depth, R, H T]`` fp32 of `Infinity.context`."""
        keys, values = context["cross_k"], context["cross_v"]
        depth, tokens, rows = keys.shape[:3]
        of_head = self._heads, tokens, self._width
        for layer, ca in enumerate(self._attentions):
            into = ca.mat_q.weight.view(self._heads, self._dim, self._width)
            out_of = ca.proj.weight.view(self._width, self._heads, self._dim).permute(1, 2, 0)
            for row in range(rows):
                k, v = keys[layer, :, row].transpose(0, 1), values[layer, :, row].transpose(0, 1)
                torch.bmm(k, into, out=self._into[layer, row].view(of_head))
                torch.bmm(v, out_of, out=self._out_of[layer, row].view(of_head))
        biases = self._biases.view(depth, 1, 1, self._heads, self._dim)
        scores = (keys.float() * biases).sum(-1).permute(0, 2, 3, 1) * self._dim**-0.5  # [depth, R, H, T]
        scores = (scores + context["text_bias"][:, None]).reshape(depth, rows, -1)
        return {"text_into": self._into, "text_out_of": self._out_of, "text_scores": scores}


def _behind_each_other(weights: Sequence[Tensor]) -> Tensor:
    """The stack of equal matrices; no copy where a stack of them was made before."""
    first, size = weights[0], weights[0].numel() * weights[0].element_size()
    storage = first.untyped_storage().data_ptr()
    if all(
        weight.untyped_storage().data_ptr() == storage and weight.data_ptr() == first.data_ptr() + index * size
        for index, weight in enumerate(weights)
    ):
        return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(list(weights))


class FusedStep:
    """One scale of Infinity, dense or pruned, with keys and values written into the cache.

    Args:
        backbone: with its matrices in fp16 or bf16 on a CUDA device (`Infinity.set_precision`).
        roles, restore: as of `Step`.

    Raises:
        InputError: a checkpoint that adds the level embedding in every chunk (none is released), or roles that do not fit.
    """

    def __init__(self, backbone: Infinity, roles: str, restore: Literal["cache", "identity"] = "cache") -> None:
        if backbone.spec.level_starts:
            raise InputError(
                "the fused CUDA step does not add the level embedding in every chunk; run this checkpoint with Step"
            )
        self.backbone = backbone
        self.segments = Step(backbone, roles, restore).segments
        self.roles = roles
        self.restore = restore
        self.layers = [_Layer(block) for block in cast("Sequence[_Block]", backbone.blocks)]

    @property
    def spans(self) -> int:
        return sum(segment.role == "d" for segment in self.segments)

    def __call__(
        self,
        run: ScaleRun,
        x: Tensor,
        context: Context,
        cache: KeyValueCache,
        span_cache: list[Tensor],
    ) -> Tensor:
        """One scale.

        Args:
            run: its sizes.
            x: ``[N, R, C]`` fp32 input, overwritten.
            context: `Prefix.context`, with what `FoldedText` adds to it where that is used.
            cache: read up to ``run.past_*`` and written behind it.
            span_cache: one ``[M, R, C]`` fp32 a span; written where ``run.capture``, read where ``run.pruned``.

        Returns: logits ``[N, R, V]`` fp32.
        """
        stream = _Stream(x)
        span = 0
        entropy: Tensor | None = None
        images = x.shape[1] // self.backbone.branches
        for index, segment in enumerate(self.segments):
            layers = range(segment.start, segment.stop)
            if segment.role == "g" or not run.pruned:
                before = stream.settle().clone() if segment.role == "d" and run.capture else None
                wanted = run.pruned and index + 1 < len(self.segments)
                for layer in layers:
                    entropy = self._layer(layer, stream, run, None, context, cache, wanted and layer == layers[-1])
                if before is not None:
                    torch.sub(stream.settle(), before, out=span_cache[span])
                span += segment.role == "d"
                continue
            assert entropy is not None
            whole = stream.settle()
            indices = select_tokens(entropy[:images], run.keep_slots)
            kept = _Stream(gather_tokens(whole, indices))
            for layer in layers:
                self._layer(layer, kept, run, indices, context, cache, False)
            if self.restore == "identity":
                stream = _Stream(scatter_tokens(whole, kept.settle(), indices))
            else:
                assert run.area_rows is not None and run.area_cols is not None
                stream = _Stream(
                    restore_tokens(whole, kept.settle(), indices, span_cache[span], run.area_rows, run.area_cols)
                )
            span += 1
        scale, shift = context["head_modulation"].unbind(0)
        head = self.backbone.head_linear
        return F.linear(stream.normed(scale, shift, head.weight), head.weight, head.bias).float()

    def _layer(
        self,
        index: int,
        stream: _Stream,
        run: ScaleRun,
        indices: Tensor | None,
        context: Context,
        cache: KeyValueCache,
        want_entropy: bool,
    ) -> Tensor | None:
        """One block on the rows of `stream`, all tokens or those at `indices`; entropy ``[R, n]`` where wanted."""
        layer, spec = self.layers[index], self.backbone.spec
        gamma1, gamma2, scale1, scale2, shift1, shift2 = context["modulation"][index].unbind(0)
        n, rows, width = stream.x.shape
        past_k, past_v, new_k, new_v = cache.pieces(index, run, n)

        product, bias = _parts(stream.normed(scale1, shift1, layer.qkv), layer.qkv, layer.qkv_bias)
        q = torch.empty_like(new_k)
        qk_norm_rope(
            product.unflatten(-1, (3, spec.heads, spec.head_dim)),
            q,
            new_k,
            new_v,
            bias=bias,
            multiplier=layer.multiplier,
            cos=run.cos,
            sin=run.sin,
            indices=indices,
            following=layer.sa_proj.weight,
        )
        attended = entropy_attention(
            q, past_k, past_v, new_k, new_v, scale=1.0, entropy="mean" if want_entropy else "none"
        )
        stream.branch, stream.bias = _branch(attended.out.view(n, rows, width), layer.sa_proj)
        stream.gamma = gamma1

        if "text_into" in context and n >= FOLDED_TOKENS:
            into, out_of = context["text_into"][index], context["text_out_of"][index]
            normed = stream.normed(layer.ca_norm.weight, layer.ca_norm.bias, into, affine=True)
            scores = torch.bmm(normed.transpose(0, 1), into.mT)  # [R, n, H T]
            text_softmax(scores, context["text_scores"][index], spec.heads, spec.head_dim**-0.5, following=out_of)
            stream.branch, stream.bias = torch.empty_like(normed), layer.ca_proj.bias
            torch.bmm(scores, out_of, out=stream.branch.transpose(0, 1))
        else:
            normed = stream.normed(layer.ca_norm.weight, layer.ca_norm.bias, layer.ca_q.weight, affine=True)
            q = _whole(normed, layer.ca_q).unflatten(-1, (spec.heads, spec.head_dim))
            text_k, text_v = context["cross_k"][index], context["cross_v"][index]
            text = text_attention(q, text_k, text_v, context["text_bias"], following=layer.ca_proj.weight)
            stream.branch, stream.bias = _branch(text.view(n, rows, width), layer.ca_proj)

        hidden = _whole(stream.normed(scale2, shift2, layer.fc1.weight), layer.fc1, layer.fc2, gelu=True)
        stream.branch, stream.bias = _branch(hidden, layer.fc2)
        stream.gamma = gamma2
        return attended.entropy


def _branch(x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return _parts(x, linear.weight, linear.bias)


def _parts(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """The product, and the bias that it lacks: ``[n, R, N]`` and None, or of few rows ``[parts, n, R, N]`` and the bias."""
    if x.shape[0] * x.shape[1] > THIN_ROWS:
        return F.linear(x, weight, bias), None
    return thin_linear(x.flatten(0, 1), weight).unflatten(1, x.shape[:2]), bias


def _whole(x: Tensor, linear: nn.Linear, following: nn.Linear | None = None, *, gelu: bool = False) -> Tensor:
    """The product ``[n, R, N]``, or GELU of it; `following` stands right behind it."""
    flat, weight, bias = x.flatten(0, 1), linear.weight, linear.bias
    if flat.shape[0] <= THIN_ROWS:
        ahead = None if following is None else following.weight
        y = add_parts(thin_linear(flat, weight), bias, x.dtype, gelu=gelu, following=ahead)
    elif gelu:
        y = torch._addmm_activation(bias, flat, weight.t(), use_gelu=True)
    else:
        y = F.linear(flat, weight, bias)
    return y.unflatten(0, x.shape[:2])
