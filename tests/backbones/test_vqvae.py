"""The VQVAE against an independent functional form that reads the state dict by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.backbones.conftest import make_var
from toprovar.backbones.vqvae import VQVAE, VQVAESpec, phi_index
from toprovar.errors import InputError

State = dict[str, Tensor]


def _conv(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    weight = state[f"{name}.weight"]
    options.setdefault("padding", weight.shape[-1] // 2)
    return F.conv2d(x, weight, state[f"{name}.bias"], **options)


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    grouped = x.reshape(x.shape[0], 32, -1)
    grouped = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return grouped.reshape(x.shape) * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _block(state: State, name: str, x: Tensor) -> Tensor:
    h = x
    for i in (1, 2):
        h = _norm(state, f"{name}.norm{i}", h)
        h = _conv(state, f"{name}.conv{i}", h * h.sigmoid())
    return h + (_conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def _attention(state: State, name: str, x: Tensor) -> Tensor:
    images, channels = x.shape[:2]
    q, k, v = _conv(state, f"{name}.qkv", _norm(state, f"{name}.norm", x)).reshape(images, 3, channels, -1).unbind(1)
    p = (torch.einsum("bcq,bck->bqk", q, k) / channels**0.5).softmax(-1)
    return x + _conv(state, f"{name}.proj_out", torch.einsum("bqk,bck->bcq", p, v).reshape(x.shape))


def _levels(state: State, side: str) -> list[int]:
    return sorted({int(key.split(".")[2]) for key in state if key.startswith((f"{side}.up.", f"{side}.down."))})


def _level(state: State, name: str, x: Tensor) -> Tensor:
    j = 0
    while f"{name}.block.{j}.conv1.weight" in state:
        x = _block(state, f"{name}.block.{j}", x)
        if f"{name}.attn.{j}.qkv.weight" in state:
            x = _attention(state, f"{name}.attn.{j}", x)
        j += 1
    return x


def _middle(state: State, name: str, x: Tensor) -> Tensor:
    x = _block(state, f"{name}.block_1", x)
    if f"{name}.attn_1.qkv.weight" in state:
        x = _attention(state, f"{name}.attn_1", x)
    return _block(state, f"{name}.block_2", x)


def _decode(state: State, codes: Tensor) -> Tensor:
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", codes))
    x = _middle(state, "decoder.mid", x)
    for i in reversed(_levels(state, "decoder")):
        x = _level(state, f"decoder.up.{i}", x)
        if i:
            x = _conv(state, f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    x = _norm(state, "decoder.norm_out", x)
    return _conv(state, "decoder.conv_out", x * x.sigmoid()).clamp(-1, 1)


def _features(state: State, image: Tensor) -> Tensor:
    x = _conv(state, "encoder.conv_in", image)
    levels = _levels(state, "encoder")
    for i in levels:
        x = _level(state, f"encoder.down.{i}", x)
        if i != levels[-1]:
            x = _conv(state, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = _norm(state, "encoder.norm_out", _middle(state, "encoder.mid", x))
    return _conv(state, "quant_conv", _conv(state, "encoder.conv_out", x * x.sigmoid()))


SPECS = [
    VQVAESpec(channels=(32, 32, 64), stem=32, latent_channels=8, vocab=48, patch_nums=(1, 2, 4)),
    VQVAESpec(
        channels=(32, 64, 64, 96), stem=64, res_blocks=1, latent_channels=5, vocab=20, phis=2, patch_nums=(1, 3, 5)
    ),
    VQVAESpec(
        channels=(64,),
        stem=32,
        latent_channels=4,
        vocab=9,
        phis=1,
        patch_nums=(2, 3),
        level_attention=False,
        quant_kernel=1,
    ),
    VQVAESpec(channels=(32, 32), stem=32, latent_channels=4, vocab=9, patch_nums=(1, 2), middle_attention=False),
]


def _random(spec: VQVAESpec) -> VQVAE:
    torch.manual_seed(11)
    vae = VQVAE(spec)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "x".join(map(str, s.channels)))
def test_decoder_and_encoder_equal_the_functional_form(spec: VQVAESpec) -> None:
    vae = _random(spec)
    state = vae.state_dict()
    last = spec.patch_nums[-1]
    codes = torch.randn(2, spec.latent_channels, last, last)
    image = vae.decode(codes)
    assert list(image.shape) == [2, 3, last * spec.stride, last * spec.stride]
    torch.testing.assert_close(image, _decode(state, codes), atol=2e-5, rtol=0)
    torch.testing.assert_close(vae.features(image), _features(state, image), atol=2e-5, rtol=0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "x".join(map(str, s.channels)))
def test_each_scale_codes_what_the_scales_before_left_over(spec: VQVAESpec) -> None:
    vae = _random(spec)
    quantiser, last = vae.quantize, spec.patch_nums[-1]
    features = torch.randn(2, spec.latent_channels, last, last)
    tokens, partial = quantiser.quantise(features)
    codes = torch.zeros_like(features)
    for scale, n in enumerate(spec.patch_nums):
        rest = F.adaptive_avg_pool2d(features - codes, (n, n)).flatten(2).mT
        distance = torch.cdist(rest, quantiser.embedding.weight.expand(2, -1, -1))
        chosen = distance.gather(2, tokens[scale][..., None])[..., 0]
        torch.testing.assert_close(chosen, distance.amin(-1), atol=1e-4, rtol=0)
        codes = quantiser.add_codes(quantiser.embedding(tokens[scale]), codes, quantiser.scale_constants(scale))
        torch.testing.assert_close(codes, partial[scale], atol=1e-6, rtol=0)
    inputs = quantiser.teacher_input(tokens)
    assert inputs.shape[1] == sum(n * n for n in spec.patch_nums[1:])
    for scale, part in enumerate(inputs.split([n * n for n in spec.patch_nums[1:]], 1)):
        n = spec.patch_nums[scale + 1]
        assert torch.equal(part, F.adaptive_avg_pool2d(partial[scale], (n, n)).flatten(2).mT)
    assert len(tokens) == len(spec.patch_nums)


def test_gradients_reach_codebook_and_phi() -> None:
    vae = _random(SPECS[0]).requires_grad_(True)
    features = torch.randn(1, 8, 4, 4, requires_grad=True)
    quantised = vae.quantize.quantise(features)
    torch.stack([(p - features.detach()).square().mean() for p in quantised.partial]).sum().backward()
    assert vae.quantize.embedding.weight.grad.abs().sum() > 0
    assert all(conv.weight.grad is not None for conv in vae.quantize.quant_resi.qresi_ls[:1])


def test_encode_then_decode_is_deterministic() -> None:
    vae = _random(SPECS[0])
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    tokens = vae.encode(image)
    assert [list(t.shape) for t in tokens] == [[1, 1], [1, 4], [1, 16]]
    assert all(torch.equal(a, b) for a, b in zip(tokens, vae.encode(image), strict=True))


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (13, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),  # 6/12 is a tie that rounding decides
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_phi_tables_of_the_original(scales: int, expected: list[int]) -> None:
    assert [phi_index(s, scales, 4) for s in range(scales)] == expected


def test_phi_ticks_for_other_counts() -> None:
    assert [phi_index(s, 5, 1) for s in range(5)] == [0] * 5
    assert [phi_index(s, 5, 2) for s in range(5)] == [0, 0, 0, 1, 1]


def test_what_it_cannot_do_is_refused() -> None:
    vae = make_var().vae
    with pytest.raises(InputError, match=r"features are \[1, 8, 5, 5\]: expected \[B, 8, 6, 6\]"):
        vae.quantize.quantise(torch.zeros(1, 8, 5, 5))
    bare = VQVAE(VQVAESpec(channels=(32,), latent_channels=8, vocab=9, patch_nums=(1, 2), encoder=False))
    with pytest.raises(InputError, match="without its encoder"):
        bare.encode(torch.zeros(1, 3, 2, 2))
