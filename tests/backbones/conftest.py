"""A small VAR with random weights: every parameter counts, also those that training starts at zero."""

from __future__ import annotations

import pytest
import torch

from toprovar.backbones.base import Sampling
from toprovar.backbones.var import VAR, VARSpec
from toprovar.backbones.vqvae import VQVAE, VQVAESpec

PATCH_NUMS = (1, 2, 3, 4, 6)


def make_var(
    *,
    depth: int = 5,
    shared_aln: bool = False,
    cosine: bool = True,
    patch_nums: tuple[int, ...] = PATCH_NUMS,
    seed: int = 0,
) -> VAR:
    """Width 64, 4 heads, 48 codes of 8 channels, pictures 4 times the last grid's size."""
    torch.manual_seed(seed)
    vae = VQVAE(VQVAESpec(channels=(32, 32, 64), stem=32, latent_channels=8, vocab=48, patch_nums=patch_nums))
    spec = VARSpec.of(
        depth=depth,
        width=64,
        heads=4,
        patch_nums=patch_nums,
        vocab=48,
        latent_channels=8,
        stride=vae.spec.stride,
        classes=10,
        shared_aln=shared_aln,
        cosine=cosine,
    )
    model = VAR(spec, vae, Sampling(guidance=1.5, top_k=20, top_p=0.9))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 and "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1)
            elif "scale_mul" in name:
                parameter.uniform_(1.0, 3.0)
            else:
                parameter.normal_(0.0, 0.15 if parameter.dim() < 2 else 0.7 / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model() -> VAR:
    return make_var()
