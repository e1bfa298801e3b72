"""How far pictures and tokens of a policy are from the dense ones, for batches and on any device.

`ssim` equals `toprovar.runtime.compare.ssim`, which needs no PyTorch; a test compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["code_error", "equal_share", "mean_squared_error", "ssim"]

# Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 2004: see `toprovar.runtime.compare`.
_WINDOW, _SIGMA, _C1, _C2 = 11, 1.5, 0.01**2, 0.03**2


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures `[B, 3, h, w]` in [0, 1] -> `[B]` float64."""
    rows, cols = (_window_matrix(size).to(a.device) for size in a.shape[-2:])

    def blur(image: Tensor) -> Tensor:
        return rows @ image @ cols.mT  # two products: GPUs have fast float64 for those, and not for convolutions

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    similarity = similarity / ((mean_a.square() + mean_b.square() + _C1) * (variance_a + variance_b + _C2))
    return similarity.mean((1, 2, 3))


def _window_matrix(size: int) -> Tensor:
    """The Gaussian window at every place of an axis where it fits: `[size - 10, size]` float64, rows sum to 1."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    matrix = torch.zeros(size - _WINDOW + 1, size, dtype=torch.float64)
    for place in range(_WINDOW):
        matrix.diagonal(place).fill_(float(weights[place] / weights.sum()))
    return matrix


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of pictures `[B, 3, h, w]` -> `[B]` float64."""
    return (a.double() - b.double()).square().mean((1, 2, 3))


def equal_share(tokens: Tensor, other: Tensor) -> Tensor:
    """Share of equal tokens of each picture: `[B, N]`, or `[B, N, bits]`, where all bits of a token must be equal -> `[B]`."""
    equal = tokens == other
    return (equal if equal.dim() == 2 else equal.all(-1)).double().mean(1)


def code_error(codes: Tensor, dense: Tensor) -> Tensor:
    """||codes - dense|| / ||dense|| of each picture's code map `[B, c, h, w]` -> `[B]`."""
    return (codes - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1).clamp_min(1e-12)
