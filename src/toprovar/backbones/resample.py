"""Resampling of token maps as matrices: `resize(map) = rows @ map @ cols.T`, one matrix an axis.

Every resize of these models is separable and has a fixed size per scale, so a graph takes two small matrices as
input instead of a Resize node whose modes the runtimes disagree about. Outside a graph `resample` calls PyTorch's
own interpolation, as the originals do. The two differ by rounding, but cosine attention multiplies q by up to 100, and
one unit in the last place of a code map can move a raw logit by 1e-4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from toprovar import kernels

__all__ = ["Mode", "area_matrix", "bicubic_matrix", "bilinear_matrix", "resample"]

Mode = Literal["area", "bicubic", "bilinear"]


def area_matrix(out_size: int, in_size: int) -> Tensor:
    """Adaptive average pooling of one axis, up or down: `mode="area"`. `[out_size, in_size]` fp32, rows sum to 1."""
    return kernels.area_matrix(out_size, in_size).float()


def bicubic_matrix(out_size: int, in_size: int) -> Tensor:
    """Bicubic resize of one axis, A = -0.75, `align_corners=False`, no antialias. `[out_size, in_size]` fp32.

    Exactly the identity where the sizes are equal.
    """
    return _interpolated_identity(out_size, in_size, "bicubic")


def bilinear_matrix(out_size: int, in_size: int) -> Tensor:
    """Linear resize of one axis (`mode="bilinear"`, `"trilinear"`), `align_corners=False`, no antialias; as above."""
    return _interpolated_identity(out_size, in_size, "bilinear")


def _interpolated_identity(out_size: int, in_size: int, mode: Mode) -> Tensor:
    # PyTorch's own fp32 coefficients: exact ones would differ from what the models were trained and run with by 4e-7.
    identity = torch.eye(in_size, device="cpu")[None, None]
    return F.interpolate(identity, size=(out_size, in_size), mode=mode, align_corners=False)[0, 0]


def resample(maps: Tensor, rows: Tensor, cols: Tensor, mode: Mode) -> Tensor:
    """Resizes `maps [B, channels, h, w]` fp32 to `[B, channels, h', w']`.

    `rows [h', h]` and `cols [w', w]` are the matrices of `mode` for these sizes. A graph multiplies by them.
    """
    if torch.compiler.is_exporting():
        return rows @ (maps @ cols.mT)
    size = (rows.shape[0], cols.shape[0])
    return F.interpolate(maps, size=size, mode=mode, align_corners=None if mode == "area" else False)
