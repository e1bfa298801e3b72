"""Infinity's picture tokenizer: a convolutional VAE around multi-scale residual binary quantisation (BSQ).

The code of one latent pixel is a vector of d signs over sqrt(d), so a token is d bits and there is no codebook. Scale
s codes what the scales before it left over: the residual is shrunk by area to the grid of the scale, its signs are the
bits, and the codes, enlarged by plain bilinear interpolation, are added up at the final grid; the decoder sees only
that sum.

Architecture and names follow FoundationVision/Infinity (infinity/models/bsq_vae/{flux_vqgan,multiscale_bsq}.py); the
parameters' names here are the released ones without the inner `.conv`/`.norm` of the original's wrapper modules.
All images are [B,3,h,w] RGB, all latents [B,d,h,w].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar.backbones.checkpoint import State, block_count, load_strict, require_kind, shape_of
from toprovar.errors import CheckpointError, InputError

__all__ = [
    "VAE_WRAPPERS",
    "BitQuantizer",
    "BsqVae",
    "MultiScaleBits",
    "VaeSpec",
    "area",
    "bilinear",
    "load_bsq_vae",
    "released_name",
]

VAE_WRAPPERS = (("vae",),)
"""Where a VAE's file may nest its tensors: the released ones under "vae"."""

Grid = tuple[int, int]


@dataclass(frozen=True)
class VaeSpec:
    """What the shapes in a VAE checkpoint tell.

    Attributes:
        latent_channels: d, the bits of one latent pixel.
        base_channels: channels of the outermost level.
        multipliers: channels of level i over `base_channels`, outermost first.
        stride: pixels per latent pixel, a power of 2.
        res_blocks: residual blocks of an encoder level (a decoder level has one more).
    """

    latent_channels: int
    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    stride: int = 16
    res_blocks: int = 2

    @property
    def halvings(self) -> int:
        """log2(stride)."""
        return self.stride.bit_length() - 1


def bilinear(x: Tensor, grid: Grid) -> Tensor:
    """Plain bilinear resize of [B,d,h,w]: half-pixel centres and **no antialias** in either direction.

    The original's 5-D `trilinear` with one frame is exactly this.
    """
    return (
        x if tuple(x.shape[-2:]) == tuple(grid) else F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
    )


def area(x: Tensor, grid: Grid) -> Tensor:
    """Area resize (adaptive average) of [B,d,h,w]."""
    return x if tuple(x.shape[-2:]) == tuple(grid) else F.adaptive_avg_pool2d(x, grid)


# ---------------------------------------------------------------------------------------------------- convolutions


class _Norm(nn.GroupNorm):
    """GroupNorm over 32 groups, or 24 where 32 do not divide the channels; eps 1e-6."""

    def __init__(self, channels: int) -> None:
        groups = 32 if channels % 32 == 0 else 24
        if channels % groups:
            raise CheckpointError(f"VAE level of {channels} channels: Infinity's VAE needs a multiple of 32 or of 24")
        super().__init__(groups, channels, eps=1e-6)


class _ResBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input (through a 1x1 where the channels change)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _Norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _Norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResBlock(channels, channels)
        self.block_2 = _ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block_2(self.block_1(x)))


class _Downsample(nn.Module):
    """3x3 at stride 2 that pads below and to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class _Level(nn.Module):
    """Residual blocks, then the change of resolution if the level has one."""

    def __init__(self, channels: Sequence[int], *, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(a, b) for a, b in pairwise(channels))
        self.downsample = _Downsample(channels[-1]) if downsample else None
        self.upsample = _Upsample(channels[-1]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class _Encoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = [spec.base_channels * m for m in spec.multipliers]
        self.conv_in = nn.Conv2d(3, spec.base_channels, 3, padding=1)
        before = [spec.base_channels, *widths[:-1]]
        self.down = nn.ModuleList(
            _Level([before[i], *[widths[i]] * spec.res_blocks], downsample=i < spec.halvings)
            for i in range(len(widths))
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class _Decoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = [spec.base_channels * m for m in spec.multipliers]
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            _Level([before[i], *[widths[i]] * (spec.res_blocks + 1)], upsample=1 <= i <= spec.halvings)
            for i in range(len(widths))
        )
        self.norm_out = _Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.mid(self.conv_in(codes))
        for level in reversed(list(self.up)):
            x = level(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x))))


# ---------------------------------------------------------------------------------------------------- quantisation


@dataclass(frozen=True)
class MultiScaleBits:
    """A picture as the transformer sees it.

    Attributes:
        bits: per scale, [B,h_s,w_s,d] int32 in {0,1}: the labels.
        inputs: per scale from the second on, [B,d,h_s,w_s]: what the transformer is fed for that scale, the sum of the
            codes so far resized to its grid. With self-correction these come from the *flipped* bits.
        codes: [B,d,h,w], the sum of all codes at the final grid: what the decoder is fed. Gradients pass straight
            through it to the features it was made of.
    """

    bits: list[Tensor]
    inputs: list[Tensor]
    codes: Tensor


class BitQuantizer:
    """Multi-scale residual binary quantisation: signs over sqrt(d), no parameters.

    Source: MultiScaleBSQ and BitwiseSelfCorrection of the original. The input of a next scale is the **bilinear**
    resize of the accumulated codes even when it shrinks them, in training as in generation; only residuals shrink by
    area.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def codes(self, bits: Tensor) -> Tensor:
        """Bits [B,h,w,d] in {0,1} -> codes [B,d,h,w] fp32, +-1/sqrt(d)."""
        magnitude = self.channels**-0.5
        return (bits.to(torch.float32) * (2 * magnitude) - magnitude).permute(0, 3, 1, 2)

    def __call__(
        self,
        features: Tensor,
        grids: Sequence[Grid],
        *,
        flip: Sequence[float] = (),
        generator: torch.Generator | None = None,
    ) -> MultiScaleBits:
        """Quantises encoder features over a schedule.

        Args:
            features: [B,d,h,w] from the encoder.
            grids: latent grids (h,w) of all scales; the last is that of `features`.
            flip: probability, per scale from the first, that a bit is flipped in what later scales see (bitwise
                self-correction of the paper); the labels of later scales then teach to repair it.
            generator: for the flips.

        Raises:
            InputError: channels or last grid do not fit.
        """
        if features.dim() != 4 or features.shape[1] != self.channels or tuple(features.shape[-2:]) != tuple(grids[-1]):
            raise InputError(
                f"features are {list(features.shape)}: for {self.channels} bits and the last grid {tuple(grids[-1])}, "
                f"expected [B,{self.channels},{grids[-1][0]},{grids[-1][1]}]"
            )
        final = grids[-1]
        features = features.float()
        seen = torch.zeros_like(features)
        bits: list[Tensor] = []
        inputs: list[Tensor] = []
        for s, grid in enumerate(grids):
            residual = area(features - seen.detach(), grid)
            unit = F.normalize(residual, dim=1)
            scale_bits = (residual > 0).to(torch.int32).permute(0, 2, 3, 1)
            bits.append(scale_bits)
            if s < len(flip) and flip[s] > 0:
                chance = torch.rand(scale_bits.shape, generator=generator, device=scale_bits.device)
                scale_bits = torch.where(chance < flip[s], 1 - scale_bits, scale_bits)
            code = unit + (self.codes(scale_bits) - unit).detach()
            seen = seen + bilinear(code, final)
            if s + 1 < len(grids):
                inputs.append(bilinear(seen, grids[s + 1]).detach())
        return MultiScaleBits(bits, inputs, seen)


# --------------------------------------------------------------------------------------------------------- the VAE


class BsqVae(nn.Module):
    """Encoder, quantiser and decoder; the encoder only where it is asked for (generation needs none)."""

    def __init__(self, spec: VaeSpec, *, encoder: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.quantizer = BitQuantizer(spec.latent_channels)
        self.encoder = _Encoder(spec) if encoder else None
        self.decoder = _Decoder(spec)

    def features(self, image: Tensor) -> Tensor:
        """[B,3,h,w] in [-1,1] -> encoder features [B,d,h/stride,w/stride] fp32."""
        if self.encoder is None:
            raise InputError("this VAE was loaded without its encoder; build it with encoder=True to encode pictures")
        return cast(Tensor, self.encoder(image.to(self.encoder.conv_in.weight.dtype))).float()

    def encode(self, image: Tensor, grids: Sequence[Grid], *, flip: Sequence[float] = ()) -> MultiScaleBits:
        """[B,3,h,w] in [-1,1] -> bits per scale, transformer inputs and code map over latent `grids`."""
        return self.quantizer(self.features(image), grids, flip=flip)

    def decode(self, codes: Tensor) -> Tensor:
        """Code map [B,d,h,w] -> picture [B,3,h*stride,w*stride] fp32 RGB, clamped to [-1,1]."""
        weight = self.decoder.conv_in.weight
        return cast(Tensor, self.decoder(codes.to(weight.dtype))).float().clamp(-1, 1)


# -------------------------------------------------------------------------------------------------------- loading

# The original wraps each convolution and norm in a module that holds it as `.conv` or `.norm`. Up- and downsampling
# call the outer module `conv` too, hence the list of what is wrapped.
_WRAPPED = re.compile(
    r"^((?:encoder|decoder)\.(?:.+\.)?(?:conv_in|conv_out|conv[12]|nin_shortcut|norm[12]|norm_out|(?:up|down)sample\.conv))"
    r"\.(?:conv|norm)\.(weight|bias)$"
)


def released_name(key: str) -> str:
    """Key of a released file -> name here: the wrapper's `.conv` or `.norm` left out if it is there."""
    return _WRAPPED.sub(r"\1.\2", key)


def ignorable(key: str) -> bool:
    """Keys of a released file that nothing needs: the weights of the bits in an integer label."""
    return key in ("quantizer.lfq.mask", "quantize.lfq.mask")


def build_bsq_vae(state: State, path: str | Path, *, encoder: bool = False) -> BsqVae:
    """A VAE of the sizes found in `state`, on the meta device; `state` gets the names used here, and loses the encoder
    unless it is wanted."""
    require_kind(state, "infinity-vae", path)
    for key in list(state):
        name = released_name(key)
        if name == key:
            continue
        if name in state:
            raise CheckpointError(f"{path}: holds {name} twice, with and without the inner .conv or .norm")
        state[name] = state.pop(key)
    spec = infer_spec(state, path)
    if not encoder:
        for key in [key for key in state if key.startswith("encoder.")]:
            del state[key]
    with torch.device("meta"):
        return BsqVae(spec, encoder=encoder)


def infer_spec(state: State, path: str | Path) -> VaeSpec:
    """The sizes from the shapes of the tensors, by the names used here."""
    levels = block_count(state, r"decoder\.up\.(\d+)\.")
    if not levels:
        raise CheckpointError(f"{path}: holds no decoder.up.*, expected the decoder of an Infinity VAE")
    widths = [shape_of(state, f"decoder.up.{i}.block.0.conv1.weight", path, 4)[0] for i in range(levels)]
    base = shape_of(state, "encoder.conv_in.weight", path, 4)[0] if "encoder.conv_in.weight" in state else widths[0]
    if bad := [width for width in widths if width % base or (width % 32 and width % 24)]:
        raise CheckpointError(
            f"{path}: decoder levels have {bad} channels: expected multiples of {base}, and of 32 or 24"
        )
    return VaeSpec(
        latent_channels=shape_of(state, "decoder.conv_in.weight", path, 4)[1],
        base_channels=base,
        multipliers=tuple(width // base for width in widths),
        stride=2 ** sum(f"decoder.up.{i}.upsample.conv.weight" in state for i in range(levels)),
        res_blocks=block_count(state, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
    )


def load_bsq_vae(
    state: State,
    path: str | Path,
    *,
    encoder: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> BsqVae:
    """Loads a VAE from the tensors of its file (`read_state_dict(path, VAE_WRAPPERS)`), which are consumed.

    Raises:
        CheckpointError: another model's file, missing or left-over keys.
    """
    vae = build_bsq_vae(state, path, encoder=encoder)
    load_strict(vae, state, path, ignore=ignorable, dtype=dtype, device=device)
    return vae.eval().requires_grad_(False)
