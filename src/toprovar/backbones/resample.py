"""Resampling of token maps as matrices: `resize(map) = rows @ map @ cols.T`, one matrix an axis.

Every resize of these models is separable and has a fixed size per scale, so a graph takes two small matrices as
input instead of a Resize node whose modes the runtimes disagree about. Each matrix reproduces
`torch.nn.functional.interpolate` of the same mode to fp32 noise; `tests/backbones/test_resample.py` compares them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toprovar import kernels

__all__ = ["area_matrix", "bicubic_matrix", "bilinear_matrix", "resample"]


def area_matrix(out_size: int, in_size: int) -> Tensor:
    """Adaptive average pooling of one axis, up or down: `mode="area"`. `[out_size, in_size]` fp32, rows sum to 1."""
    return kernels.area_matrix(out_size, in_size).float()


def bicubic_matrix(out_size: int, in_size: int) -> Tensor:
    """Bicubic resize of one axis: `mode="bicubic", align_corners=False`, A = -0.75, no antialias, edges repeated.

    Returns: `[out_size, in_size]` fp32, exactly the identity where the sizes are equal.
    """
    a = -0.75

    def near(t: float) -> float:  # |t| <= 1
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: float) -> float:  # 1 < |t| < 2
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    matrix = torch.zeros(out_size, in_size, dtype=torch.float64)
    for i in range(out_size):
        centre = (i + 0.5) * in_size / out_size - 0.5
        left = math.floor(centre)
        t = centre - left
        for offset, weight in zip((-1, 0, 1, 2), (far(1 + t), near(t), near(1 - t), far(2 - t)), strict=True):
            matrix[i, min(max(left + offset, 0), in_size - 1)] += weight
    return matrix.float()


def bilinear_matrix(out_size: int, in_size: int) -> Tensor:
    """Linear resize of one axis: `mode="bilinear"` (or `"trilinear"`), `align_corners=False`, no antialias.

    Returns: `[out_size, in_size]` fp32, exactly the identity where the sizes are equal.
    """
    matrix = torch.zeros(out_size, in_size, dtype=torch.float64)
    for i in range(out_size):
        centre = max((i + 0.5) * in_size / out_size - 0.5, 0.0)
        left = min(math.floor(centre), in_size - 1)
        matrix[i, left] += 1 - (centre - left)
        matrix[i, min(left + 1, in_size - 1)] += centre - left
    return matrix.float()


def resample(maps: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """`maps [..., h, w]` resized to `[..., h', w']` by `rows [h', h]` and `cols [w', w]`, in the dtype of `maps`."""
    return rows.to(maps.dtype) @ maps @ cols.to(maps.dtype).mT
