"""The BSQ VAE's decoder for a CUDA GPU: channels-last half precision, and nothing between convolutions moved twice.

cuDNN's convolutions take their bias in a pass of its own, and GroupNorm, SiLU and the residual addition are three more.
Here the bias of a convolution goes into what reads its output anyway: the norm behind it, or the residual addition.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar.backbones.bsq_vae import BsqVae
from toprovar.kernels.fused import add_bias, group_norm_silu

__all__ = ["FusedDecoder"]


def _conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution without its bias."""
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _norm_silu(x: Tensor, norm: nn.GroupNorm, pre_bias: Tensor | None = None) -> Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, pre_bias=pre_bias, eps=norm.eps)


class FusedDecoder:
    """`BsqVae.forward` with fused kernels; its widths must be powers of two.

    Args:
        vae: on a CUDA device; its decoder is cast in place.
        dtype: fp16 or bf16.
    """

    def __init__(self, vae: BsqVae, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.decoder = vae.decoder.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _block(self, x: Tensor, block: nn.Module) -> Tensor:
        conv1, conv2 = cast(nn.Conv2d, block.conv1), cast(nn.Conv2d, block.conv2)
        h = _conv(_norm_silu(x, cast(nn.GroupNorm, block.norm1)), conv1)
        h = _conv(_norm_silu(h, cast(nn.GroupNorm, block.norm2), conv1.bias), conv2)
        bias = cast(Tensor, conv2.bias)
        if block.nin_shortcut is not None:
            shortcut = cast(nn.Conv2d, block.nin_shortcut)
            x, bias = _conv(x, shortcut), bias + cast(Tensor, shortcut.bias)
        return add_bias(h, x, bias)

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes ``[B, d, h, w]`` -> RGB ``[B, 3, height, width]`` fp32 in [0, 1]."""
        decoder = self.decoder
        x = decoder.conv_in(codes.to(self.dtype, memory_format=torch.channels_last))
        x = self._block(self._block(x, decoder.mid.block_1), decoder.mid.block_2)
        for level in reversed(list(decoder.up)):
            for block in level.block:
                x = self._block(x, block)
            if level.upsample is not None:
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        image = decoder.conv_out(_norm_silu(x, decoder.norm_out))
        return image.float().clamp(-1, 1) * 0.5 + 0.5
