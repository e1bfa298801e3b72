"""A block taken apart into its residual branches, each on any subset of tokens, for policies that prune branch by branch.

The sum of the branches is the block itself (`tests/exporter/test_policies.py` compares them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from toprovar.backbones.base import Backbone, Context, layer_norm
from toprovar.errors import InputError
from toprovar.kernels import entropy_attention

__all__ = ["Attended", "Branches", "branches_of"]


class Attended(NamedTuple):
    """`update [n, R, C]` fp32, what the branch adds; `new_k`, `new_v [n, R, H, D]`."""

    update: Tensor
    new_k: Tensor
    new_v: Tensor


class Branches(NamedTuple):
    """attention(x, rope, past_k, past_v); cross, of text models only, and ffn: `x [n, R, C]` -> what they add to it."""

    attention: Callable[[Tensor, Tensor | None, Tensor, Tensor], Attended]
    cross: Callable[[Tensor], Tensor] | None
    ffn: Callable[[Tensor], Tensor]


def branches_of(backbone: Backbone, layer: int, context: Context) -> Branches:
    """The branches of one layer; `context` is `State.context`.

    Raises:
        InputError: a backbone that adds its level embedding inside the blocks.
    """
    block: Any = backbone.blocks[layer]
    own = backbone.layer_context(layer, context)
    if "levels" in own:
        raise InputError("a block that adds level embeddings has no branches: use a checkpoint that adds them once")
    gamma1, gamma2, scale1, scale2, shift1, shift2 = own["modulation"].unbind(0)
    attn = block.sa if hasattr(block, "sa") else block.attn

    def attention(x: Tensor, rope: Tensor | None, past_k: Tensor, past_v: Tensor) -> Attended:
        h = layer_norm(x) * (1 + scale1) + shift1
        q, k, v = attn.qkv(h) if rope is None else attn.qkv(h, rope)
        scale = backbone.spec.attention_scale
        out = entropy_attention(q, past_k, past_v, k, v, scale=scale, entropy="none").out.flatten(-2)
        projected = F.linear(out.to(attn.proj.weight.dtype), attn.proj.weight, attn.proj.bias)
        return Attended(projected.float() * gamma1, k, v)

    def cross(x: Tensor) -> Tensor:
        text = layer_norm(x, block.ca_norm.weight, block.ca_norm.bias)
        update: Tensor = block.ca(text, own["cross_k"], own["cross_v"], own["text_bias"])
        return update.float()

    def ffn(x: Tensor) -> Tensor:
        update: Tensor = block.ffn(layer_norm(x) * (1 + scale2) + shift2)
        return update.float() * gamma2

    return Branches(attention, cross if hasattr(block, "ca") else None, ffn)
