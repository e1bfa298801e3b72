"""The matrices against PyTorch's interpolation."""

import pytest
import torch
from torch.nn import functional as F

from toprovar.backbones.resample import area_matrix, bicubic_matrix, bilinear_matrix

MATRICES = {"area": area_matrix, "bicubic": bicubic_matrix, "bilinear": bilinear_matrix}


@pytest.mark.parametrize("mode", MATRICES)
@pytest.mark.parametrize(
    ("source", "target"), [((1, 1), (6, 6)), ((3, 5), (7, 8)), ((13, 16), (16, 16)), ((16, 9), (6, 5))]
)
def test_matrices_equal_interpolate(mode: str, source: tuple[int, int], target: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *source, generator=torch.Generator().manual_seed(1))
    rows, cols = (MATRICES[mode](o, i) for o, i in zip(target, source, strict=True))
    expected = F.interpolate(maps, size=target, mode=mode, align_corners=None if mode == "area" else False)
    torch.testing.assert_close(rows @ maps @ cols.mT, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mode", MATRICES)
def test_equal_sizes_are_the_identity(mode: str) -> None:
    assert torch.equal(MATRICES[mode](7, 7), torch.eye(7))
