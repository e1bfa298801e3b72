"""Tokens for training: pictures through a trained VQVAE, with wrong tokens on purpose where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar.backbones.vqvae import VQVAE, VQVAESpec


def shrink(maps: Tensor, edge: int) -> Tensor:
    """Area resize of `[B, d, P, P]` to `[B, d, edge, edge]`."""
    return F.interpolate(maps, size=(edge, edge), mode="area") if edge != maps.shape[-1] else maps


def enlarge(maps: Tensor, edge: int) -> Tensor:
    """Bicubic resize of `[B, d, n, n]` to `[B, d, edge, edge]`."""
    return F.interpolate(maps, size=(edge, edge), mode="bicubic") if edge != maps.shape[-1] else maps


@torch.no_grad()
def tokenize(vae: VQVAE, features: Tensor, corrupt: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return labels `[B, L]` int64 and transformer inputs `[B, L - 1, d]` fp32 of encoder features `[B, d, P, P]`.

    With `corrupt`, each picture gets a share of wrong tokens, uniform in [0, corrupt): one of the four next nearest
    codes instead of the nearest. What later scales see and have to code includes the mistake, so the transformer
    learns to repair what sampling will do to it (bitwise self-correction of the Infinity paper, for a codebook).
    """
    features = features.float()
    batch, channels, final, _ = features.shape
    device, codebook = features.device, vae.quantize.embedding.weight
    share = corrupt * torch.rand(batch, 1, device=device)
    total = torch.zeros_like(features)
    labels, inputs = [], []
    patches = vae.spec.patch_nums
    for s, n in enumerate(patches):
        small = shrink(features - total, n).permute(0, 2, 3, 1).reshape(-1, channels)
        distance = codebook.square().sum(1) - 2 * small @ codebook.T
        near = distance.topk(5 if corrupt else 1, dim=1, largest=False).indices.view(batch, n * n, -1)
        labels.append(near[..., 0])
        seen = near[..., 0]
        if corrupt:
            other = near.gather(2, torch.randint(1, 5, (batch, n * n, 1), device=device)).squeeze(2)
            seen = torch.where(torch.rand(batch, n * n, device=device) < share, other, seen)
        maps = F.embedding(seen.view(batch, n, n), codebook).permute(0, 3, 1, 2)
        total = total + vae.quantize.phi(enlarge(maps, final), s)
        if s + 1 < len(patches):
            inputs.append(shrink(total, patches[s + 1]).flatten(2).transpose(1, 2))
    return torch.cat(labels, 1), torch.cat(inputs, 1)


@torch.no_grad()
def residual_vectors(vae: VQVAE, features: Tensor) -> list[Tensor]:
    """Return what each scale would code if codes were exact, `[m, d]` a scale: where a codebook starts from."""
    rest, found = features.float(), []
    for s, n in enumerate(vae.spec.patch_nums):
        small = shrink(rest, n)
        found.append(small.permute(0, 2, 3, 1).reshape(-1, small.shape[1]))
        rest = rest - vae.quantize.phi(enlarge(small, rest.shape[-1]), s)
    return found


PATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Token grids of the demo: 2130 tokens, three quarters of them in the last two scales, as in the large models."""


def demo_sizes(
    channels: Sequence[int] = (32, 32, 64, 96),
    latent_channels: int = 16,
    vocab: int = 1024,
    patch_nums: Sequence[int] = PATCHES,
) -> VQVAESpec:
    """Return the sizes of the demo's VQVAE: stride 8, 256 pixels to 32 x 32."""
    return VQVAESpec(
        channels=tuple(channels),
        stem=channels[0],
        latent_channels=latent_channels,
        vocab=vocab,
        patch_nums=tuple(patch_nums),
    )


def untrained_vqvae(device: torch.device) -> VQVAE:
    """Return a VQVAE that knows nothing, to rehearse with."""
    return VQVAE(demo_sizes()).eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def load_vqvae(path: Path, device: torch.device) -> VQVAE:
    """Return the frozen VQVAE, encoder and all, in a checkpoint of train_vqvae.py."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    sizes = saved["sizes"]
    spec = VQVAESpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})
    vae = VQVAE(spec)
    vae.load_state_dict(saved["model"])
    return vae.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
