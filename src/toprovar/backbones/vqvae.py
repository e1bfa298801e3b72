"""VQVAE of VAR (also used by STAR and HART): convolutional encoder and decoder, and the multi-scale residual quantiser.

A picture is coded as one token map a scale. Each scale's codes are resized to the final grid, smoothed by one of a few
"phi" convolutions shared by neighbouring scales, and added up to the code map f_hat, from which the picture is decoded.
Parameter names are those of the released `vae_ch160v4096z32.pth`.

Source: FoundationVision/VAR models/basic_vae.py, models/quant.py, models/vqvae.py (commit 78b9539).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toprovar.backbones.base import Constants
from toprovar.backbones.checkpoint import State, block_count, load_strict, require_kind, shape_of
from toprovar.backbones.resample import bicubic_matrix, resample
from toprovar.errors import CheckpointError, InputError

__all__ = ["Quantised", "ResidualQuantizer", "VQVAE", "VQVAESpec", "load_vqvae", "phi_index"]

_GROUPS = 32  # GroupNorm groups at every width


@dataclass(frozen=True)
class VQVAESpec:
    """Sizes of a VQVAE. `channels` is the width of each resolution level, finest first (ch x ch_mult)."""

    channels: tuple[int, ...] = (160, 160, 320, 320, 640)
    stem: int = 160
    """Width of the encoder's first convolution (ch)."""
    res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    latent_channels: int = 32
    vocab: int = 4096
    phis: int = 4
    phi_ratio: float = 0.5
    """r in phi(h) = (1 - r) h + r conv(h); not stored in the file."""
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    level_attention: bool = True
    """Attention after every residual block of the coarsest level."""
    middle_attention: bool = True
    quant_kernel: int = 3
    """Kernel size of quant_conv and post_quant_conv."""
    encoder: bool = True

    @property
    def stride(self) -> int:
        """Pixels per cell of the final code map."""
        return 2 ** (len(self.channels) - 1)


# ------------------------------------------------------------------------------------------ layers


class _GroupNorm(nn.GroupNorm):
    """GroupNorm, eps 1e-6, in fp32: its variance overflows fp16."""

    def __init__(self, channels: int):
        super().__init__(_GROUPS, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class _ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.nin_shortcut: nn.Module = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class _Attention(nn.Module):
    """Single-head attention over the cells of a map, residual; softmax in fp32."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.scale = channels**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # [B, C, h*w]
        scores = (q.mT @ k).float() * self.scale
        out = v @ scores.softmax(-1).to(v.dtype).mT
        return x + self.proj_out(out.reshape(x.shape))


class _Middle(nn.Module):
    def __init__(self, channels: int, attention: bool):
        super().__init__()
        self.block_1 = _ResBlock(channels, channels)
        self.attn_1: nn.Module = _Attention(channels) if attention else nn.Identity()
        self.block_2 = _ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one row below, one column to the right


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(out_channels if i else in_channels, out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class _DownLevel(_Level):
    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, last: bool):
        super().__init__(in_channels, out_channels, blocks, attention)
        self.downsample: nn.Module = nn.Identity() if last else _Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class _UpLevel(_Level):
    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, last: bool):
        super().__init__(in_channels, out_channels, blocks, attention)
        self.upsample: nn.Module = nn.Identity() if last else _Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


class _Encoder(nn.Module):
    def __init__(self, spec: VQVAESpec):
        super().__init__()
        widths, deepest = spec.channels, len(spec.channels) - 1
        self.conv_in = nn.Conv2d(3, spec.stem, 3, padding=1)
        self.down = nn.ModuleList(
            _DownLevel(
                widths[i - 1] if i else spec.stem,
                widths[i],
                spec.res_blocks,
                attention=spec.level_attention and i == deepest,
                last=i == deepest,
            )
            for i in range(len(widths))
        )
        self.mid = _Middle(widths[-1], spec.middle_attention)
        self.norm_out = _GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, spec: VQVAESpec):
        super().__init__()
        widths, deepest = spec.channels, len(spec.channels) - 1
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], spec.middle_attention)
        self.up = nn.ModuleList(  # finest first, as the names are; run from the coarsest
            _UpLevel(
                widths[min(i + 1, deepest)],
                widths[i],
                spec.res_blocks + 1,
                attention=spec.level_attention and i == deepest,
                last=i == 0,
            )
            for i in range(len(widths))
        )
        self.norm_out = _GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


# --------------------------------------------------------------------------------------- quantiser


def phi_index(scale: int, scales: int, phis: int) -> int:
    """Which of `phis` convolutions a scale uses: the one whose tick is nearest to scale / (scales - 1).

    In numpy float64 as the original computes it, because at an odd number of scales 0.5 is a tie that rounding decides.
    """
    first = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(first, 1 - first, phis)
    return int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1))))


class _Phis(nn.Module):
    """The phi convolutions, under the name they have in the file."""

    def __init__(self, phis: int, channels: int):
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(phis))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All of them as one: weight `[phis * channels, channels, 3, 3]`, bias `[phis * channels]`, fp32."""
        convs = [conv for conv in self.qresi_ls if isinstance(conv, nn.Conv2d)]
        weights = torch.cat([conv.weight for conv in convs]).float()
        return weights, torch.cat([conv.bias for conv in convs if conv.bias is not None]).float()


class Quantised(NamedTuple):
    """tokens: `[B, n*n]` int64 a scale. partial: f_hat `[B, channels, P, P]` after each scale, with gradient."""

    tokens: list[Tensor]
    partial: list[Tensor]


class ResidualQuantizer(nn.Module):
    """Multi-scale residual vector quantisation: what each scale leaves over, the next ones code."""

    def __init__(self, spec: VQVAESpec):
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab, spec.latent_channels)
        self.quant_resi = _Phis(spec.phis, spec.latent_channels)

    def phi(self, maps: Tensor, scale: int) -> Tensor:
        """The smoothing of a scale, `[B, channels, P, P]` -> same."""
        conv = self.quant_resi.qresi_ls[phi_index(scale, len(self.spec.patch_nums), self.spec.phis)]
        return self._blend(maps, conv(maps))

    def _blend(self, maps: Tensor, smooth: Tensor) -> Tensor:
        return maps * (1 - self.spec.phi_ratio) + smooth * self.spec.phi_ratio

    def scale_constants(self, scale: int) -> dict[str, Tensor]:
        """What `add_codes` takes of a scale: up_rows `[P, n]`, up_cols `[P, n]`, phi `[phis]` (one 1, else 0), fp32."""
        up = bicubic_matrix(self.spec.patch_nums[-1], self.spec.patch_nums[scale])
        phi = torch.zeros(self.spec.phis)
        phi[phi_index(scale, len(self.spec.patch_nums), self.spec.phis)] = 1.0
        return {"up_rows": up, "up_cols": up.clone(), "phi": phi}

    def add_codes(self, vectors: Tensor, codes: Tensor, constants: Constants) -> Tensor:
        """f_hat after a scale: `codes [B, channels, P, P]` plus phi of the resized `vectors [B, N, channels]`.

        A graph serves all scales, so all phi convolutions run as one and `constants["phi"]` picks from their outputs.
        """
        rows, cols = constants["up_rows"], constants["up_cols"]
        maps = vectors.float().mT.reshape(vectors.shape[0], vectors.shape[2], rows.shape[1], cols.shape[1])
        maps = resample(maps, rows, cols, "bicubic")
        weights, biases = self.quant_resi.stacked()
        smooth = F.conv2d(maps, weights, biases, padding=1).unflatten(1, (self.spec.phis, -1))
        smooth = (smooth * constants["phi"].reshape(-1, 1, 1, 1)).sum(1)
        return codes + self._blend(maps, smooth)

    def _enlarged(self, tokens: Tensor, scale: int) -> Tensor:
        """phi of the codes of `tokens [B, n*n]` at the final grid, differentiable."""
        n, last = self.spec.patch_nums[scale], self.spec.patch_nums[-1]
        maps = self.embedding(tokens).mT.unflatten(2, (n, n))
        if scale != len(self.spec.patch_nums) - 1:
            maps = F.interpolate(maps, size=(last, last), mode="bicubic")
        return self.phi(maps, scale)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The code nearest to each of `vectors [n, channels]`, `[n]` int64."""
        codebook = self.embedding.weight
        distance = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return torch.addmm(distance, vectors, codebook.T, alpha=-2).argmin(1)

    def quantise(self, features: Tensor) -> Quantised:
        """Codes encoder features `[B, channels, P, P]` scale by scale.

        The tokens carry no gradient; `partial` has one to the codebook and the phi convolutions, which is what a
        trainer's codebook loss needs.
        """
        last = self.spec.patch_nums[-1]
        if features.shape[1:] != (self.spec.latent_channels, last, last):
            raise InputError(
                f"features are {list(features.shape)}: expected [B, {self.spec.latent_channels}, {last}, {last}]"
            )
        rest = features.detach()
        f_hat = torch.zeros_like(rest)
        tokens, partial = [], []
        for scale, n in enumerate(self.spec.patch_nums):
            with torch.no_grad():
                small = F.interpolate(rest, size=(n, n), mode="area") if n != last else rest
                drawn = self.nearest(small.permute(0, 2, 3, 1).flatten(0, 2)).reshape(-1, n * n)
            added = self._enlarged(drawn, scale)
            f_hat = f_hat + added
            rest = rest - added.detach()
            tokens.append(drawn)
            partial.append(f_hat)
        return Quantised(tokens, partial)

    @torch.no_grad()
    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """What the transformer sees of given tokens: f_hat after scale s, area-resized to scale s + 1, for all s.

        Args:
            tokens: `[B, n*n]` a scale; the last scale's are not used and may be left out.

        Returns: `[B, L - n_0, channels]`, scales 1 .. S-1 concatenated (idxBl_to_var_input of the original).
        """
        last = self.spec.patch_nums[-1]
        f_hat = self.embedding.weight.new_zeros(tokens[0].shape[0], self.spec.latent_channels, last, last)
        inputs = []
        for scale, n in enumerate(self.spec.patch_nums[1:]):
            f_hat = f_hat + self._enlarged(tokens[scale], scale)
            inputs.append(F.interpolate(f_hat, size=(n, n), mode="area").flatten(2).mT)
        return torch.cat(inputs, dim=1)


class VQVAE(nn.Module):
    """Pictures in [-1, 1] to token maps and back."""

    def __init__(self, spec: VQVAESpec):
        super().__init__()
        self.spec = spec
        if spec.encoder:
            self.encoder = _Encoder(spec)
            self.quant_conv = nn.Conv2d(
                spec.latent_channels, spec.latent_channels, spec.quant_kernel, padding=spec.quant_kernel // 2
            )
        self.decoder = _Decoder(spec)
        self.post_quant_conv = nn.Conv2d(
            spec.latent_channels, spec.latent_channels, spec.quant_kernel, padding=spec.quant_kernel // 2
        )
        self.quantize = ResidualQuantizer(spec)

    def features(self, image: Tensor) -> Tensor:
        """`image [B, 3, height, width]` in [-1, 1] -> what is quantised, `[B, latent_channels, P, P]`."""
        if not self.spec.encoder:
            raise InputError("this VQVAE was loaded without its encoder: give a checkpoint that holds encoder.*")
        return self.quant_conv(self.encoder(image))

    @torch.no_grad()
    def encode(self, image: Tensor) -> list[Tensor]:
        """`image [B, 3, height, width]` in [-1, 1] -> token maps, `[B, n*n]` int64 a scale."""
        return self.quantize.quantise(self.features(image)).tokens

    def decode(self, codes: Tensor) -> Tensor:
        """`codes [B, latent_channels, P, P]` -> `[B, 3, height, width]` fp32 in [-1, 1]."""
        dtype = self.post_quant_conv.weight.dtype
        return self.decoder(self.post_quant_conv(codes.to(dtype))).float().clamp(-1, 1)


# ----------------------------------------------------------------------------------------- loading


def infer_spec(state: State, path: str | Path, patch_nums: Sequence[int], phi_ratio: float = 0.5) -> VQVAESpec:
    """Sizes of a VQVAE from the shapes in its state dict; `patch_nums` and `phi_ratio` are not in the file."""
    levels = block_count(state, r"decoder\.up\.(\d+)\.")
    if not levels:
        raise CheckpointError(f"{path}: holds no decoder.up.*, expected the decoder of a VQVAE")
    vocab, latent = shape_of(state, "quantize.embedding.weight", path, 2)
    encoder = any(key.startswith("encoder.") for key in state)
    deepest = levels - 1
    channels = tuple(shape_of(state, f"decoder.up.{i}.block.0.conv1.weight", path, 4)[0] for i in range(levels))
    if bad := [width for width in channels if width % _GROUPS]:
        raise CheckpointError(f"{path}: decoder levels have {bad} channels: expected multiples of {_GROUPS}")
    phis = block_count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    if not phis:
        raise CheckpointError(f"{path}: holds no quantize.quant_resi.*, expected phi convolutions of a VQVAE")
    return VQVAESpec(
        channels=channels,
        stem=shape_of(state, "encoder.conv_in.weight", path, 4)[0] if encoder else channels[0],
        res_blocks=block_count(state, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        latent_channels=latent,
        vocab=vocab,
        phis=phis,
        phi_ratio=phi_ratio,
        patch_nums=tuple(patch_nums),
        level_attention=f"decoder.up.{deepest}.attn.0.qkv.weight" in state,
        middle_attention="decoder.mid.attn_1.qkv.weight" in state,
        quant_kernel=shape_of(state, "post_quant_conv.weight", path, 4)[2],
        encoder=encoder,
    )


def build_vqvae(
    state: State, path: str | Path, patch_nums: Sequence[int], *, phi_ratio: float = 0.5, encoder: bool = True
) -> VQVAE:
    """A VQVAE of the sizes found in `state`, on the meta device; without `encoder` those keys leave `state`."""
    require_kind(state, "vqvae", path)
    _rename_phis(state)
    if not encoder:
        for key in [key for key in state if key.startswith(("encoder.", "quant_conv."))]:
            del state[key]
    with torch.device("meta"):
        return VQVAE(infer_spec(state, path, patch_nums, phi_ratio))


def _rename_phis(state: State) -> None:
    """The original stores one shared phi as `qresi`, and one phi a scale as plain numbers."""
    for key in [key for key in state if key.startswith("quantize.quant_resi.")]:
        rest = key.removeprefix("quantize.quant_resi.")
        if rest.startswith("qresi."):
            state["quantize.quant_resi.qresi_ls.0." + rest.removeprefix("qresi.")] = state.pop(key)
        elif rest[0].isdigit():
            state["quantize.quant_resi.qresi_ls." + rest] = state.pop(key)


def ignorable(key: str) -> bool:
    """Keys of a released file that generation does not need: how often each code was hit in training."""
    return key == "quantize.ema_vocab_hit_SV"


def load_vqvae(
    state: State,
    path: str | Path,
    patch_nums: Sequence[int],
    *,
    phi_ratio: float = 0.5,
    encoder: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VQVAE:
    """Loads a VQVAE from the tensors of its file (`read_state_dict`), which are consumed.

    Args:
        patch_nums: the transformer's schedule; the file does not hold one.
        phi_ratio: `quant_resi` of the original.
        encoder: False leaves the encoder out; it is left out as well where the file has none.

    Raises:
        CheckpointError: another model's file, missing or left-over keys.
    """
    vae = build_vqvae(state, path, patch_nums, phi_ratio=phi_ratio, encoder=encoder)
    load_strict(vae, state, path, ignore=ignorable, dtype=dtype, device=device)
    return vae.eval().requires_grad_(False)
