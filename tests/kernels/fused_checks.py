"""What `test_fused.py` runs: every fused kernel, and Infinity made of them, against plain PyTorch."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import torch
import torch.nn.functional as F

from toprovar.backbones.base import Sampling
from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
from toprovar.backbones.generate import Pruning, generate
from toprovar.backbones.infinity import Infinity, InfinitySpec
from toprovar.kernels import fused
from toprovar.profiles.noise import scale_noise, uniform


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape and not found.isnan().any()
    worst = float((found.float() - wanted.float()).abs().max())
    assert worst <= tolerance, f"largest difference {worst:.2e}, allowed {tolerance:.0e}"


def kernels(device: str) -> None:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    n, rows, width = 5, 4, 72
    x, branch, modulation = normal(n, rows, width), normal(n, rows, width), normal(3, rows, width)
    total = x + branch * modulation[0]
    wanted = F.layer_norm(total, (width,), eps=1e-6) * (1 + modulation[1]) + modulation[2]
    found, normed = fused.residual_norm(x.clone(), branch, *modulation)
    assert normed is not None
    near(found, total, 1e-6)
    near(normed, wanted, 1e-5)
    weight, bias = normal(width), normal(width)
    _, normed = fused.residual_norm(x.clone(), branch, None, weight, bias, affine=True)
    assert normed is not None
    near(normed, F.layer_norm(x + branch, (width,), weight, bias, 1e-6), 1e-5)
    untouched, nothing = fused.residual_norm(x.clone(), branch, modulation[0])
    assert nothing is None
    near(untouched, total, 1e-6)

    heads, dim = 3, 24
    qkv, factor, angle = normal(n, rows, 3, heads, dim), normal(heads).exp(), normal(n, 2, dim // 2)
    q, k, v = (torch.full((n, rows, heads, dim), float("nan"), device=device) for _ in range(3))
    fused.qk_norm_rope(qkv, q, k, v, multiplier=factor, cos=angle.cos(), sin=angle.sin())

    def turned(t: torch.Tensor) -> torch.Tensor:
        a, pairs = angle.repeat(1, rows // 2, 1)[:, :, None], t.unflatten(-1, (-1, 2))
        even, odd = pairs.unbind(-1)
        return torch.stack([even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()], -1).flatten(-2)

    raw_q, raw_k, raw_v = qkv.unbind(2)
    near(q, turned(F.normalize(raw_q, dim=-1) * factor[:, None]), 1e-5)
    near(k, turned(F.normalize(raw_k, dim=-1)), 1e-6)
    near(v, raw_v, 0.0)
    fused.qk_norm_rope(qkv, q, k, v)
    near(q, raw_q, 0.0)
    near(k, raw_k, 0.0)

    # A mean far from 0, sizes that fill no tile, and a channel bias that the norm has to add first.
    picture = (normal(2, 64, 9, 13) * 3 + 20).contiguous(memory_format=torch.channels_last)
    scale, shift, before = normal(64), normal(64), normal(64)
    near(fused.group_norm_silu(picture, scale, shift), F.silu(F.group_norm(picture, 32, scale, shift, 1e-6)), 2e-4)
    near(
        fused.group_norm_silu(picture, scale, shift, pre_bias=before, silu=False),
        F.group_norm(picture + before[:, None, None], 32, scale, shift, 1e-6),
        2e-4,
    )
    near(fused.add_bias(picture, 2 * picture, before), 3 * picture + before[:, None, None], 1e-5)

    seeds = [5, (7 << 32) + 3]
    noise = fused.philox_uniform(torch.tensor(seeds, device=device), 4, 50, 14)
    for image, seed in enumerate(seeds):
        assert np.array_equal(noise[:, image].cpu().numpy().ravel(), uniform(seed, 4, 700))


def tiny_infinity() -> Infinity:
    torch.manual_seed(0)
    spec = InfinitySpec(
        backbone="infinity",
        depth=6,
        width=64,
        heads=4,
        head_dim=16,
        ffn_width=256,
        vocab=16,
        grids=((1, 1), (2, 2), (4, 4), (6, 6)),
        latent_channels=8,
        latent_grid=(6, 6),
        image_size=(12, 12),
        attention_scale=1.0,
        rope_width=16,
        bits=8,
        text_width=32,
        text_maximum_tokens=8,
        pool_heads=2,
    )
    backbone = Infinity(spec, BsqVae(VaeSpec(8, 32, (1, 1), 2)), Sampling(guidance=3.0, top_p=0.9))
    for parameter in backbone.parameters():
        parameter.data = torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3)
    return backbone.eval().requires_grad_(False)


def infinity() -> None:
    """`InfinityGraphs` without graphs, dense and pruned, with and without padding, against `generate`."""
    from toprovar.backbones.infinity_graphs import InfinityGraphs

    # On a CPU `_addmm_activation` takes the error function where cuBLAS has tanh.
    torch._addmm_activation = lambda b, a, w, use_gelu: F.gelu(torch.addmm(b, a, w), approximate="tanh")
    backbone, text = tiny_infinity(), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    dense = Pruning.none(backbone.spec)
    cases = [
        (dense, [5, 5]),
        (Pruning("gddgdd", (1, 4, 10, 13), 1), [5, 3]),
        (Pruning("gddgdd", (1, 4, 10, 13), None, "identity"), [5, 5]),
        (dataclasses.replace(dense, scales_run=(0, 1, 2)), [5, 5]),
    ]
    seeds = [7, 9]
    for pruning, lengths in cases:
        condition = (text, torch.tensor(lengths))
        wanted = generate(
            backbone,
            backbone.prefix(*condition),
            pruning=pruning,
            noise=lambda s, shape: torch.from_numpy(scale_noise(seeds, s, shape[0], shape[2])),
        )
        engine = InfinityGraphs(
            backbone,
            pruning,
            images=2,
            text_tokens=5,
            padded=min(lengths) < 5,
            graphs=False,
            decoder_dtype="float32",
        )
        assert wanted.image is not None
        near(engine.generate(condition, seeds), wanted.image, 1e-4)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    kernels("cpu")
    print("kernels hold")
    infinity()
    print("Infinity holds")
