"""Tokens for training: pictures through a trained VQVAE, with wrong tokens on purpose where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar.backbones.resample import area_matrix, bicubic_matrix
from toprovar.backbones.vqvae import VQVAE, VQVAESpec


class Scales:
    """Resizing among the square grids of a schedule by matrices; the last grid is that of the codes.

    Interpolation kernels compute the same, but the bicubic one costs more than the rest of tokenizing.
    """

    def __init__(self, patch_nums: tuple[int, ...], device: torch.device) -> None:
        final = patch_nums[-1]
        self.edges = patch_nums
        self.down = [area_matrix(n, final).to(device) for n in patch_nums]
        self.up = [bicubic_matrix(final, n).to(device) for n in patch_nums]

    def shrink(self, maps: Tensor, scale: int) -> Tensor:
        """Area resize `[B, d, P, P]` -> `[B, d, n, n]`."""
        return maps if self.edges[scale] == self.edges[-1] else self.down[scale] @ (maps @ self.down[scale].T)

    def enlarge(self, maps: Tensor, scale: int) -> Tensor:
        """Bicubic resize `[B, d, n, n]` -> `[B, d, P, P]`."""
        return maps if self.edges[scale] == self.edges[-1] else self.up[scale] @ (maps @ self.up[scale].T)


@torch.no_grad()
def tokenize(vae: VQVAE, features: Tensor, corrupt: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return labels `[B, L]` int64 and transformer inputs `[B, L - 1, d]` fp32 of encoder features `[B, d, P, P]`.

    With `corrupt`, each picture gets a share of wrong tokens, uniform in [0, corrupt): one of the four next nearest
    codes instead of the nearest. What later scales see and have to code includes the mistake, so the transformer
    learns to repair what sampling will do to it (bitwise self-correction of the Infinity paper, for a codebook).
    """
    features = features.float()
    batch, channels = features.shape[:2]
    device, codebook = features.device, vae.quantize.embedding.weight
    share = corrupt * torch.rand(batch, 1, device=device)
    total = torch.zeros_like(features)
    labels, inputs = [], []
    scales = Scales(vae.spec.patch_nums, device)
    for s, n in enumerate(scales.edges):
        small = scales.shrink(features - total, s).permute(0, 2, 3, 1).reshape(-1, channels)
        distance = codebook.square().sum(1) - 2 * small @ codebook.T
        near = distance.topk(5 if corrupt else 1, dim=1, largest=False).indices.view(batch, n * n, -1)
        labels.append(near[..., 0])
        seen = near[..., 0]
        if corrupt:
            other = near.gather(2, torch.randint(1, 5, (batch, n * n, 1), device=device)).squeeze(2)
            seen = torch.where(torch.rand(batch, n * n, device=device) < share, other, seen)
        maps = F.embedding(seen.view(batch, n, n), codebook).permute(0, 3, 1, 2)
        total = total + vae.quantize.phi(scales.enlarge(maps, s), s)
        if s + 1 < len(scales.edges):
            inputs.append(scales.shrink(total, s + 1).flatten(2).transpose(1, 2))
    return torch.cat(labels, 1), torch.cat(inputs, 1)


@torch.no_grad()
def residual_vectors(vae: VQVAE, features: Tensor) -> list[Tensor]:
    """Return what each scale would code if codes were exact, `[m, d]` a scale: where a codebook starts from."""
    rest, found, scales = features.float(), [], Scales(vae.spec.patch_nums, features.device)
    for s in range(len(scales.edges)):
        small = scales.shrink(rest, s)
        found.append(small.permute(0, 2, 3, 1).reshape(-1, small.shape[1]))
        rest = rest - vae.quantize.phi(scales.enlarge(small, s), s)
    return found


PATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Token grids of the demo: 2130 tokens, three quarters of them in the last two scales, as in the large models."""


def demo_sizes(
    channels: Sequence[int] = (32, 32, 64, 96),
    latent_channels: int = 16,
    vocab: int = 1024,
    patch_nums: Sequence[int] = PATCHES,
    res_blocks: int = 1,
) -> VQVAESpec:
    """Return the sizes of the demo's VQVAE: stride 8, 256 pixels to 32 x 32."""
    return VQVAESpec(
        channels=tuple(channels),
        stem=channels[0],
        res_blocks=res_blocks,
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
