"""The BSQ tokenizer beyond its golden case: bits, gradients, self-correction, precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from toprovar.backbones.bsq_vae import BitQuantizer, BsqVae, VaeSpec
from toprovar.errors import InputError

GRIDS = ((1, 1), (2, 3), (4, 6))


def make_vae(encoder: bool = True) -> BsqVae:
    torch.manual_seed(0)
    spec = VaeSpec(latent_channels=5, base_channels=24, multipliers=(1, 4), stride=2, res_blocks=1)
    return BsqVae(spec, encoder=encoder).eval()


def test_bits_code_the_residual_scale_by_scale() -> None:
    torch.manual_seed(1)
    quantizer = BitQuantizer(5)
    features = torch.randn(2, 5, 4, 6)
    coded = quantizer(features, GRIDS)
    seen = torch.zeros_like(features)
    for scale, grid in enumerate(GRIDS):
        rest = F.interpolate(features - seen, grid, mode="area")
        assert torch.equal(coded.bits[scale], (rest > 0).int().permute(0, 2, 3, 1))
        codes = torch.where(rest > 0, 1.0, -1.0) / 5**0.5
        # The original's 5-D trilinear interpolation of one frame.
        seen = seen + F.interpolate(codes[:, :, None], (1, 4, 6), mode="trilinear")[:, :, 0]
        if scale + 1 < len(GRIDS):
            expected = F.interpolate(seen[:, :, None], (1, *GRIDS[scale + 1]), mode="trilinear")[:, :, 0]
            torch.testing.assert_close(coded.inputs[scale], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(coded.codes, seen, rtol=0, atol=1e-6)


def test_codes_have_unit_length() -> None:
    bits = torch.randint(0, 2, (2, 4, 6, 5))
    codes = BitQuantizer(5).codes(bits)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, 4, 6))
    assert torch.equal(codes > 0, bits.permute(0, 3, 1, 2) == 1)


def test_flipped_bits_change_inputs_and_later_labels_only() -> None:
    torch.manual_seed(2)
    quantizer, features = BitQuantizer(5), torch.randn(3, 5, 4, 6)
    plain = quantizer(features, GRIDS)
    flipped = quantizer(features, GRIDS, flip=(1.0,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.bits[0], flipped.bits[0])  # the label is the true bit
    torch.testing.assert_close(flipped.inputs[0], -plain.inputs[0])
    assert not torch.equal(plain.bits[1], flipped.bits[1])
    never = quantizer(features, GRIDS, flip=(0.0, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain.bits, never.bits, strict=True))
    a, b = (quantizer(features, GRIDS, flip=(0.3, 0.3), generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.codes, b.codes)


def test_gradients_pass_through_the_quantiser() -> None:
    vae = make_vae()
    image = torch.rand(1, 3, 8, 12) * 2 - 1
    coded = vae.encode(image, GRIDS)
    vae.decode(coded.codes).square().mean().backward()
    assert vae.encoder is not None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in vae.encoder.parameters())
    assert not any(inputs.requires_grad for inputs in coded.inputs)


def test_pictures_are_clamped_and_have_the_stride() -> None:
    vae = make_vae(encoder=False)
    image = vae.decode(100 * torch.randn(2, 5, 4, 6))
    assert image.shape == (2, 3, 8, 12) and image.min() >= -1 and image.max() <= 1
    with pytest.raises(InputError, match="without its encoder"):
        vae.features(image)


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected \[B,5,4,6\]"):
        BitQuantizer(5)(torch.zeros(1, 5, 6, 4), GRIDS)


@torch.no_grad()
def test_channels_last_and_half_precision() -> None:
    vae, codes = make_vae(), torch.randn(2, 5, 4, 6)
    expected = vae.decode(codes)
    vae = vae.to(memory_format=torch.channels_last)
    torch.testing.assert_close(vae.decode(codes), expected, rtol=0, atol=1e-5)
    for dtype, allowed in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = vae.to(dtype).decode(codes)
        assert half.dtype is torch.float32
        assert (half - expected).abs().max() < allowed
    assert vae.features(torch.zeros(1, 3, 8, 12)).dtype is torch.float32
