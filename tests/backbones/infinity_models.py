"""A small Infinity with random weights: every parameter counts, also those that training starts at zero."""

from __future__ import annotations

import torch
from torch import Tensor

from toprovar.backbones.base import Sampling
from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
from toprovar.backbones.infinity import Infinity, InfinitySpec

TEXT_WIDTH = 24
MAXIMUM_TOKENS = 12


def make_infinity(
    *,
    depth: int = 4,
    patch: int = 1,
    grids: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (3, 2), (6, 4)),
    level_starts: tuple[int, ...] = (),
    encoder: bool = False,
    seed: int = 0,
) -> Infinity:
    """Width 48, 3 heads, 4 latent channels, pictures 2 times the latent grid's size."""
    torch.manual_seed(seed)
    vae = BsqVae(
        VaeSpec(latent_channels=4, base_channels=24, multipliers=(1, 2), stride=2, res_blocks=1), encoder=encoder
    )
    bits = 4 * patch**2
    height, width = grids[-1][0] * patch, grids[-1][1] * patch
    spec = InfinitySpec(
        backbone="infinity",
        depth=depth,
        width=48,
        heads=3,
        head_dim=16,
        ffn_width=96,
        vocab=2 * bits,
        grids=grids,
        latent_channels=4,
        latent_grid=(height, width),
        image_size=(2 * height, 2 * width),
        attention_scale=1.0,
        rope_width=32 + bool(level_starts),
        bits=bits,
        patch=patch,
        text_width=TEXT_WIDTH,
        text_maximum_tokens=MAXIMUM_TOKENS,
        pool_heads=4,
        levels=max(6, len(grids)),
        rope_grid=(78, 52),
        level_starts=level_starts,
    )
    model = Infinity(spec, vae, Sampling(guidance=2.0, temperature=0.8, top_p=0.9))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1)
            elif "scale_mul" in name:
                parameter.uniform_(1.0, 3.0)
            else:
                parameter.normal_(0.0, 0.15 if parameter.dim() < 2 else 0.7 / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


def make_text(lengths: tuple[int, ...], *, tokens: int | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features `[B, T, TEXT_WIDTH]`, zero in the padding, and lengths `[B]`; place and seed determine a prompt."""
    tokens = max(lengths) if tokens is None else tokens
    features = torch.zeros(len(lengths), tokens, TEXT_WIDTH)
    for image, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + image)
        features[image, :length] = torch.randn(length, TEXT_WIDTH, generator=generator)
    return features, torch.tensor(lengths)
