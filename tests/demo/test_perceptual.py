"""The perceptual net: a distance is one, and its file is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toprovar.demo.perceptual import PerceptualNet
from toprovar.errors import CheckpointError


@pytest.fixture
def net() -> PerceptualNet:
    torch.manual_seed(0)
    return PerceptualNet((8, 16, 16, 24)).eval().requires_grad_(False)


def test_distance_is_zero_for_equal_pictures_symmetric_and_grows(net: PerceptualNet) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 64, 64, generator=generator)
    noise = torch.rand(a.shape, generator=generator)
    near, far = torch.lerp(a, noise, 0.05), torch.lerp(a, noise, 0.5)
    assert torch.equal(net.distance(a, a), torch.zeros(3))
    assert torch.allclose(net.distance(a, far), net.distance(far, a, batch=2), atol=1e-6)
    assert (0 < net.distance(a, near)).all() and (net.distance(a, near) < net.distance(a, far)).all()


def test_features_do_not_depend_on_the_batch(net: PerceptualNet) -> None:
    pictures = torch.rand(5, 3, 64, 64)
    assert net.features(pictures).shape == (5, 24)
    assert torch.allclose(net.features(pictures), net.features(pictures, batch=2), atol=1e-5)


def test_the_file_is_checked(net: PerceptualNet, tmp_path: Path) -> None:
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    pictures = torch.rand(2, 3, 64, 64)
    loaded = PerceptualNet.load(tmp_path / "net.safetensors")
    assert torch.equal(loaded.features(pictures), net.features(pictures))
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not the demo's perceptual net"):
        PerceptualNet.load(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="reinstall"):
        PerceptualNet.load(tmp_path / "missing.safetensors")
