"""The BSQ VAE's decoder for a CUDA GPU: channels-last half precision, and nothing between convolutions moved twice.

cuDNN's convolutions take their bias in a pass of its own, and GroupNorm, SiLU and the residual addition are three more.
Here the bias of a convolution goes into what reads its output anyway: the norm behind it, or the residual addition.

A 3 x 3 convolution of a picture that was doubled by repetition sees 2 x 2 different pixels; which, depends on whether the
row and the column are even. So it is four convolutions of 2 x 2 on the small picture, 4/9 of the products, done as one
with four times the channels.

What runs through the blocks beside the convolutions grows with every one of them and overflows fp16 (a decoder was seen to
reach 69,000). Only norms and linear maps read it, so it is carried at 1/64, a power of two, with the norms' eps to match:
the same numbers, without the overflow.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar.backbones.bsq_vae import BsqVae, _Level
from toprovar.kernels.fused import add_bias, group_norm_silu, interleave

__all__ = ["FusedDecoder"]


def _conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution without its bias."""
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _norm_silu(x: Tensor, norm: nn.GroupNorm, pre_bias: Tensor | None = None) -> Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, pre_bias=pre_bias, eps=norm.eps)


def _phase_weights(weight: Tensor) -> Tensor:
    """3 x 3 weights ``[O, I, 3, 3]`` -> 2 x 2 of the four phases ``[4 O, I, 2, 2]``, the order of `interleave`.

    Above an even row lies one small row, below it the row's own copy; under an odd row the other way round.
    """
    rows = torch.stack(
        [torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2),
         torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2)]
    )  # fmt: skip  # [2 phases, O, I, 2, 3]
    phases = torch.stack(
        [torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], -1),
         torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], -1)],
        1,
    )  # fmt: skip  # [2, 2, O, I, 2, 2]
    return phases.flatten(0, 2)


_STREAM = 2.0**-6
"""Scale of what runs beside the convolutions."""


def _scaled(decoder: nn.Module) -> nn.Module:
    """A copy of the decoder that carries its residual stream at `_STREAM`."""
    decoder = copy.deepcopy(decoder)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.GroupNorm) and not name.endswith("norm2"):  # norm2 is inside a block
            module.eps *= _STREAM**2
        elif isinstance(module, nn.Conv2d):
            stem = name.rpartition(".")[2]
            if stem in ("conv_in", "conv2"):  # what enters the stream
                module.weight.data *= _STREAM
            if stem in ("conv_in", "conv2", "nin_shortcut", "conv") and module.bias is not None:  # conv: of upsampling
                module.bias.data *= _STREAM
    return decoder


class FusedDecoder:
    """`BsqVae.decode` with fused kernels, or plain where a width of the decoder is no power of two.

    Args:
        vae: on a CUDA device; not changed.
        dtype: fp16 or bf16.
    """

    def __init__(self, vae: BsqVae, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self._phases = [
            None
            if level.upsample is None
            else _phase_weights(level.upsample.conv.weight.detach().float()).to(
                dtype, memory_format=torch.channels_last
            )
            for level in cast("Sequence[_Level]", vae.decoder.up)
        ]
        widths = [module.num_channels for module in vae.decoder.modules() if isinstance(module, nn.GroupNorm)]
        self._fused = all(width & (width - 1) == 0 for width in widths)
        decoder = _scaled(vae.decoder)
        self.decoder = decoder.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # the fastest algorithm, not the first
            if self._fused:
                return self._decode(codes)
            image = self.decoder(codes.to(self.dtype, memory_format=torch.channels_last))
            return cast(Tensor, image).float().clamp(-1, 1) * 0.5 + 0.5

    def _decode(self, codes: Tensor) -> Tensor:
        decoder = self.decoder
        x = decoder.conv_in(codes.to(self.dtype, memory_format=torch.channels_last))
        x = self._block(self._block(x, decoder.mid.block_1), decoder.mid.block_2)
        for level, phases in reversed(list(zip(decoder.up, self._phases, strict=True))):
            for block in level.block:
                x = self._block(x, block)
            if phases is not None:
                x = interleave(F.conv2d(x, phases, padding=1), level.upsample.conv.bias)
        image = decoder.conv_out(_norm_silu(x, decoder.norm_out))
        return image.float().clamp(-1, 1) * 0.5 + 0.5
