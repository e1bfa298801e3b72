"""The VQVAE's layers rewritten for training on a GPU: the same numbers in a third of the memory traffic.

`toprovar.backbones.vqvae` is written to be read and exported. Its GroupNorm leaves bf16 and channels-last at every
call, and the gradient of bicubic interpolation took a third of a training step (70 of 240 ms on an H100). Here
GroupNorm and SiLU are one compiled function that reduces over the outer axis of channels-last maps, attention is the
fused one, and enlarging a map is two matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokens import Scales
from torch import Tensor, nn

from toprovar.backbones import vqvae as plain

GROUPS = 32


def norm(x: Tensor, weight: Tensor, bias: Tensor, activate: bool) -> Tensor:
    """GroupNorm over 32 groups, then SiLU if asked; x `[B, C, h, w]` channels-last, statistics in fp32."""
    batch, channels, height, width = x.shape
    cells = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels).float()
    mean = cells.mean(1).view(batch, GROUPS, -1).mean(2, keepdim=True)
    square = (cells * cells).mean(1).view(batch, GROUPS, -1).mean(2, keepdim=True)
    inverse = torch.rsqrt((square - mean * mean).clamp(min=0) + 1e-6)
    scale = inverse.expand(-1, -1, channels // GROUPS).reshape(batch, channels) * weight
    shift = bias - mean.expand(-1, -1, channels // GROUPS).reshape(batch, channels) * scale
    out = cells * scale.unsqueeze(1) + shift.unsqueeze(1)
    out = (F.silu(out) if activate else out).to(x.dtype)
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def quicken(vae: plain.VQVAE, compiled: bool) -> None:
    """Give the layers of `vae` their fast forward, used in training mode; its parameters stay as they are."""
    fast_norm = norm
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one version a map size: there are eight
        fast_norm = torch.compile(norm, dynamic=False)

    def group_norm(layer: nn.Module) -> None:
        slow = layer.forward

        def forward(x: Tensor) -> Tensor:
            return fast_norm(x, layer.weight, layer.bias, False) if layer.training else slow(x)

        layer.forward = forward  # type: ignore[method-assign]

    def res_block(block: nn.Module) -> None:
        slow = block.forward

        def forward(x: Tensor) -> Tensor:
            if not block.training:
                return slow(x)
            h = block.conv1(fast_norm(x, block.norm1.weight, block.norm1.bias, True))
            h = block.conv2(fast_norm(h, block.norm2.weight, block.norm2.bias, True))
            return block.nin_shortcut(x) + h

        block.forward = forward  # type: ignore[method-assign]

    def attention(block: nn.Module) -> None:
        slow = block.forward

        def forward(x: Tensor) -> Tensor:
            if not block.training:
                return slow(x)
            batch, channels, height, width = x.shape
            cells = block.qkv(block.norm(x)).permute(0, 2, 3, 1).reshape(batch, 1, height * width, 3 * channels)
            q, k, v = cells.chunk(3, dim=-1)
            out = F.scaled_dot_product_attention(q, k, v).view(batch, height, width, channels).permute(0, 3, 1, 2)
            return x + block.proj_out(out)

        block.forward = forward  # type: ignore[method-assign]

    for module in vae.modules():
        if isinstance(module, plain._GroupNorm):
            group_norm(module)
        elif isinstance(module, plain._ResBlock):
            res_block(module)
        elif isinstance(module, plain._Attention):
            attention(module)


class Coding(NamedTuple):
    """codes: f_hat `[B, d, P, P]`. loss: scalar. tokens: `[B * n * n]` a scale. wanted: `[B * n * n, d]` a scale."""

    codes: Tensor
    loss: Tensor
    tokens: list[Tensor]
    wanted: list[Tensor]


def quantise(quantizer: plain.ResidualQuantizer, scales: Scales, features: Tensor, commitment: float = 0.25) -> Coding:
    """Code `features [B, d, P, P]` scale by scale, with VAR's loss.

    Every partial sum is drawn to the features, and the features, `commitment` times as hard, to it. `wanted` is what
    each scale had to code. Equal to `ResidualQuantizer.quantise` but for rounding.
    """
    goal = features.detach()
    total = torch.zeros_like(goal)
    losses, tokens, wanted = [], [], []
    for s, n in enumerate(scales.edges):
        with torch.no_grad():
            small = scales.shrink(goal - total, s).permute(0, 2, 3, 1).reshape(-1, goal.shape[1])
            token = quantizer.nearest(small)
        maps = quantizer.embedding(token).view(-1, n, n, goal.shape[1]).permute(0, 3, 1, 2)
        total = total + quantizer.phi(scales.enlarge(maps, s), s)
        losses.append(commitment * F.mse_loss(features, total.detach()) + F.mse_loss(total, goal))
        tokens.append(token)
        wanted.append(small)
    return Coding(total, torch.stack(losses).mean(), tokens, wanted)
