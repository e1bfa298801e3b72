"""What `test_fused.py` runs: every fused kernel, and Infinity made of them, against plain PyTorch."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from toprovar.backbones.base import Sampling, guide, gumbel
from toprovar.backbones.bsq_vae import BsqVae, VaeSpec
from toprovar.backbones.bsq_vae_cuda import _phase_weights
from toprovar.backbones.generate import Pruning, generate
from toprovar.backbones.infinity import Infinity, InfinitySpec, masked_attention, text_bias
from toprovar.kernels import fused, linear
from toprovar.profiles.noise import scale_noise


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
    parts = normal(3, n, rows, width)
    found, _ = fused.residual_norm(x.clone(), parts, modulation[0], bias=bias)
    near(found, x + (parts.sum(0) + bias) * modulation[0], 1e-5)
    untouched, nothing = fused.residual_norm(x.clone(), branch, modulation[0])
    assert nothing is None
    near(untouched, total, 1e-6)

    heads, dim = 3, 24
    parts, bias = normal(2, n, rows, 3, heads, dim), normal(3 * heads * dim)
    factor, angle = normal(heads).exp(), normal(9, 1, dim // 2)
    indices = torch.tensor([[0, 2, 3, 5, 8], [1, 2, 4, 6, 7]], dtype=torch.int32, device=device)
    qkv = parts.sum(0) + bias.view(3, heads, dim)

    def turned(t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """t [N, R, H, D] by angles a [N, R or 1, D/2]."""
        a, pairs = a[:, :, None], t.unflatten(-1, (-1, 2))
        even, odd = pairs.unbind(-1)
        return torch.stack([even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()], -1).flatten(-2)

    raw_q, raw_k, raw_v = qkv.unbind(2)
    of_kept = angle[indices.long()][:, :, 0].repeat(rows // 2, 1, 1).transpose(0, 1)
    q, k, v = (torch.full((n, rows, heads, dim), float("nan"), device=device) for _ in range(3))
    for given, missing, where, a in ((qkv, None, None, angle[:n]), (parts, bias, indices, of_kept)):
        fused.qk_norm_rope(
            given, q, k, v, bias=missing, multiplier=factor, cos=angle.cos(), sin=angle.sin(), indices=where
        )
        near(q, turned(F.normalize(raw_q, dim=-1) * factor[:, None], a), 2e-5)
        near(k, turned(F.normalize(raw_k, dim=-1), a), 1e-6)
        near(v, raw_v, 1e-6)
    fused.qk_norm_rope(qkv, q, k, v)
    near(q, raw_q, 0.0)
    near(k, raw_k, 0.0)

    for m, outputs, inputs in ((1, 64, 128), (5, 192, 256), (17, 128, 448), (32, 128, 512)):
        x, weight, bias = normal(m, inputs), normal(outputs, inputs), normal(outputs)
        parts, wanted = linear.thin_linear(x, weight), x @ weight.T
        near(parts.sum(0), wanted, 2e-4)
        wanted += bias
        near(fused.add_parts(parts, bias, torch.float32), wanted, 2e-4)
        near(fused.add_parts(parts, bias, torch.float32, gelu=True), F.gelu(wanted, approximate="tanh"), 2e-4)

    for n, tokens, dim in ((1, 5, 16), (19, 64, 24), (70, 150, 32)):
        q, k, v = normal(n, rows, heads, dim), normal(tokens, rows, heads, dim), normal(tokens, rows, heads, dim)
        bias = text_bias(torch.tensor([1, tokens, tokens // 2, 3], device=device), tokens)
        wanted = masked_attention(q, k, v, bias)  # first: what wrote the bias must have ended when the kernel begins
        near(fused.text_attention(q, k, v, bias), wanted, 2e-4)

    scores, bias = normal(3, 7, 5 * 11), normal(3, 5 * 11)
    wanted = (scores * 0.5 + bias[:, None]).unflatten(-1, (5, 11)).softmax(-1).flatten(-2)
    near(fused.text_softmax(scores, bias, 5, 0.5), wanted, 1e-5)

    # A mean far from 0, sizes that fill no tile, and a channel bias that the norm has to add first.
    picture = (normal(2, 64, 9, 13) * 3 + 20).contiguous(memory_format=torch.channels_last)
    scale, shift, before = normal(64), normal(64), normal(64)
    near(fused.group_norm_silu(picture, scale, shift), F.silu(F.group_norm(picture, 32, scale, shift, 1e-6)), 2e-4)
    near(
        fused.group_norm_silu(picture, scale, shift, pre_bias=before, silu=False),
        F.group_norm(picture + before[:, None, None], 32, scale, shift, 1e-6),
        2e-4,
    )
    # Constant but for one pixel, where a variance by subtraction is less than nothing.
    flat = torch.full((1, 64, 40, 40), 50.0, device=device).contiguous(memory_format=torch.channels_last)
    flat[..., 0, 0] = 0.0
    wanted = F.group_norm(flat.double(), 32, scale.double(), shift.double(), 1e-6).float()
    near(fused.group_norm_silu(flat, scale, shift, silu=False), wanted, 1e-3)
    near(fused.add_bias(picture, 2 * picture, before), 3 * picture + before[:, None, None], 1e-5)

    small, taps, before = normal(2, 16, 5, 7), normal(16, 16, 3, 3), normal(16)
    phases = F.conv2d(small, _phase_weights(taps), padding=1).contiguous(memory_format=torch.channels_last)
    doubled = F.interpolate(small, scale_factor=2.0, mode="nearest")
    near(fused.interleave(phases, before), F.conv2d(doubled, taps, before, padding=1), 1e-4)

    words, weight, bias, position = normal(9, 2, 10), normal(72, 10), normal(72), normal(1, 1, 72)
    wanted = words @ weight.T + bias + position
    near(fused.embed_words(words, weight, bias, position, 2), torch.cat([wanted, wanted], 1), 1e-5)

    seeds = [5, (7 << 32) + 3]
    logits, noise = normal(50, 4, 14), torch.from_numpy(scale_noise(seeds, 4, 50, 14)).to(device)
    for guidance in (torch.tensor([3.0, -2.0], device=device), torch.tensor([1.5], device=device)):
        given = logits[:, : 2 * len(guidance)].contiguous()
        zero, one = guide(given, guidance).unflatten(-1, (-1, 2)).unbind(-1)
        noise_zero, noise_one = gumbel(noise).unflatten(-1, (-1, 2)).unbind(-1)
        certain = torch.sigmoid(-(one - zero).abs()) <= 1 - 0.9
        wanted = (one - zero + torch.where(certain, 0.0, noise_one - noise_zero) > 0).transpose(0, 1)
        drawn = fused.draw_bits(given, torch.tensor(seeds, device=device), guidance, 4, top_p=0.9)
        assert torch.equal(drawn.bool(), wanted)
        drawn = fused.draw_bits(given, torch.tensor(seeds, device=device), guidance, 4, top_p=0.9, greedy=True)
        assert torch.equal(drawn.bool(), (one > zero).transpose(0, 1))


def tiny_infinity() -> Infinity:
    torch.manual_seed(0)
    spec = InfinitySpec(
        backbone="infinity",
        depth=4,
        width=64,
        heads=4,
        head_dim=16,
        ffn_width=256,
        vocab=16,
        grids=((1, 1), (2, 2), (4, 4), (5, 5)),
        latent_channels=8,
        latent_grid=(5, 5),
        image_size=(10, 10),
        attention_scale=1.0,
        rope_width=32,
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
    from toprovar.backbones import infinity_cuda
    from toprovar.backbones.infinity_graphs import InfinityGraphs

    infinity_cuda.FOLDED_TOKENS = 10  # some scales with the text folded into their products, some without

    # On a CPU `_addmm_activation` takes the error function where cuBLAS has tanh.
    torch._addmm_activation = lambda b, a, w, use_gelu: F.gelu(  # type: ignore[assignment,misc]
        torch.addmm(b, a, w), approximate="tanh"
    )
    backbone, text = tiny_infinity(), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    dense = Pruning.none(backbone.spec)
    cases = [
        (dense, [5, 5]),
        (Pruning("gdgd", (1, 4, 10, 11), 1), [5, 3]),
        (Pruning("gdgd", (1, 4, 10, 11), None, "identity"), [5, 5]),
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
            graphs=False,
            decoder_dtype="float32",
        )
        assert wanted.image is not None
        near(engine.generate(condition, seeds), wanted.image, 1e-4)
    graph_loop(backbone, text)


def graph_loop(backbone: Infinity, text: torch.Tensor) -> None:
    """The loop of target torch, by a bundle's schedule; the second picture follows the tokens of the first."""
    from toprovar.runtime.torch_graphs import GraphLoop

    pruning = Pruning("gdgd", (1, 4, 10, 11), 1, scales_run=(0, 1, 2))
    steps = [SimpleNamespace(scale=s, keep=pruning.keep[s], capture_span_delta=s == 1) for s in (0, 1, 2)]
    bundle: Any = SimpleNamespace(
        manifest=SimpleNamespace(
            schedules={"plain": SimpleNamespace(steps=steps)},
            model=SimpleNamespace(roles=pruning.roles),
            precision="float32",
        ),
        graph=lambda name: SimpleNamespace(inputs=[SimpleNamespace(name="span_cache_0")]),
    )
    condition = (text[:1], torch.tensor([3]))
    wanted = generate(
        backbone,
        backbone.prefix(*condition),
        pruning=pruning,
        noise=lambda s, shape: torch.from_numpy(scale_noise([7], s, shape[0], shape[2])),
    )
    assert wanted.image is not None
    loop = GraphLoop(bundle, backbone, 1, graphs=False)
    inputs = {"text_features": condition[0].numpy(), "text_lengths": np.array([3], np.int32)}
    done: list[int] = []
    first = loop.run("plain", inputs, [7], lambda: done.append(1))
    near(torch.from_numpy(first.images), wanted.image, 1e-4)
    assert len(done) == 3 and len(first.timing.scales) == 3
    for scale, tokens in zip((0, 1, 2), wanted.tokens, strict=True):
        assert np.array_equal(first.tokens[scale], tokens.numpy())
    second = loop.run("plain", inputs, [8], follow=first.tokens)
    assert np.array_equal(second.codes, first.codes) and not np.array_equal(second.tokens[2], first.tokens[2])


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    kernels("cpu")
    print("kernels hold")
    infinity()
    print("Infinity holds")
