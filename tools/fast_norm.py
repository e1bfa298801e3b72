"""GroupNorm and SiLU as one differentiable step over channels-last maps, in Triton, with PyTorch beside it.

Training the demo's decoder is bound by memory traffic and by launches. PyTorch's GroupNorm leaves bf16 under autocast
and channels-last always, and torch.compile, which mends that, takes a minute to do it, as long as the whole training.
Forward: per-channel sums, then one pass over the map. Backward: two sums, then one pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch comes without
    triton = None

GROUPS = 32
EPS = 1e-6
_BLOCK = 8192  # numbers a program holds at a time: cells x channels

if triton is not None:

    @triton.jit
    def _forward_sums(x, out, cells, C: tl.constexpr, CP: tl.constexpr, CELLS: tl.constexpr):
        image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, col = block * CELLS + tl.arange(0, CELLS), tl.arange(0, CP)
        inside = (row < cells)[:, None] & (col < C)[None, :]
        value = tl.load(x + image * cells * C + row[:, None] * C + col[None, :], inside, 0.0).to(tl.float32)
        place = out + (image * tl.num_programs(1) + block) * 2 * C + col
        tl.store(place, tl.sum(value, 0), col < C)
        tl.store(place + C, tl.sum(value * value, 0), col < C)

    @triton.jit
    def _forward(x, scale, shift, y, cells, C: tl.constexpr, CP: tl.constexpr, CELLS: tl.constexpr, SILU: tl.constexpr):
        image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, col = block * CELLS + tl.arange(0, CELLS), tl.arange(0, CP)
        inside = (row < cells)[:, None] & (col < C)[None, :]
        at = image * cells * C + row[:, None] * C + col[None, :]
        a = tl.load(scale + image * C + col, col < C, 0.0)[None, :]
        b = tl.load(shift + image * C + col, col < C, 0.0)[None, :]
        z = tl.load(x + at, inside, 0.0).to(tl.float32) * a + b
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        tl.store(y + at, z.to(y.dtype.element_ty), inside)

    @triton.jit
    def _slope(x, dy, a, b, SILU: tl.constexpr):
        if SILU:
            z = x * a + b
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
        return dy

    @triton.jit
    def _backward_sums(
        x, dy, scale, shift, out, cells, C: tl.constexpr, CP: tl.constexpr, CELLS: tl.constexpr, SILU: tl.constexpr
    ):
        image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, col = block * CELLS + tl.arange(0, CELLS), tl.arange(0, CP)
        inside = (row < cells)[:, None] & (col < C)[None, :]
        at = image * cells * C + row[:, None] * C + col[None, :]
        a = tl.load(scale + image * C + col, col < C, 0.0)[None, :]
        b = tl.load(shift + image * C + col, col < C, 0.0)[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        dz = _slope(value, tl.load(dy + at, inside, 0.0).to(tl.float32), a, b, SILU)
        place = out + (image * tl.num_programs(1) + block) * 2 * C + col
        tl.store(place, tl.sum(dz, 0), col < C)
        tl.store(place + C, tl.sum(dz * value, 0), col < C)

    @triton.jit
    def _backward(
        x,
        dy,
        scale,
        shift,
        by_x,
        by_one,
        dx,
        cells,
        C: tl.constexpr,
        CP: tl.constexpr,
        CELLS: tl.constexpr,
        SILU: tl.constexpr,
    ):
        image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, col = block * CELLS + tl.arange(0, CELLS), tl.arange(0, CP)
        inside = (row < cells)[:, None] & (col < C)[None, :]
        at = image * cells * C + row[:, None] * C + col[None, :]
        a = tl.load(scale + image * C + col, col < C, 0.0)[None, :]
        b = tl.load(shift + image * C + col, col < C, 0.0)[None, :]
        p = tl.load(by_x + image * C + col, col < C, 0.0)[None, :]
        q = tl.load(by_one + image * C + col, col < C, 0.0)[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        dz = _slope(value, tl.load(dy + at, inside, 0.0).to(tl.float32), a, b, SILU)
        tl.store(dx + at, (a * dz + p * value + q).to(dx.dtype.element_ty), inside)


def _block_sizes(channels: int) -> dict[str, Any]:
    padded = triton.next_power_of_2(channels)
    return {"C": channels, "CP": padded, "CELLS": max(16, _BLOCK // padded)}


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        cells = height * width
        sizes = _block_sizes(channels)
        grid = (batch, triton.cdiv(cells, sizes["CELLS"]))
        sums = torch.empty(*grid, 2, channels, device=x.device)
        _forward_sums[grid](x, sums, cells, **sizes)
        mean, square = (sums.sum(1).view(batch, 2, GROUPS, -1).mean(3) / cells).unbind(1)  # [B, groups]
        inverse = torch.rsqrt((square - mean * mean).clamp(min=0) + EPS)
        each = channels // GROUPS
        mean, inverse = mean.repeat_interleave(each, 1), inverse.repeat_interleave(each, 1)
        scale = inverse * weight
        shift = bias - mean * scale
        y = torch.empty_like(x)
        _forward[grid](x, scale, shift, y, cells, **sizes, SILU=silu)
        ctx.save_for_backward(x, weight, mean, inverse, scale, shift)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, mean, inverse, scale, shift = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        cells = height * width
        sizes = _block_sizes(channels) | {"SILU": ctx.silu}
        grid = (batch, triton.cdiv(cells, sizes["CELLS"]))
        sums = torch.empty(*grid, 2, channels, device=x.device)
        _backward_sums[grid](x, dy, scale, shift, sums, cells, **sizes)
        total, by_value = sums.sum(1).unbind(1)  # of dz and dz * x, [B, C]
        by_normal = inverse * (by_value - mean * total)  # of dz times the normalised x

        def group_mean(t: Tensor) -> Tensor:
            each = channels // GROUPS
            return (t.view(batch, GROUPS, each).mean(2) / cells).repeat_interleave(each, 1)

        first, second = group_mean(total * weight), group_mean(by_normal * weight)
        by_x = -inverse * inverse * second
        by_one = -inverse * first - by_x * mean
        dx = torch.empty_like(x)
        _backward[grid](x, dy, scale, shift, by_x, by_one, dx, cells, **sizes)
        return dx, by_normal.sum(0), total.sum(0), None


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, silu: bool = True) -> Tensor:
    """GroupNorm over 32 groups with fp32 statistics, then SiLU if asked.

    x `[B, C, h, w]` of any float dtype, weight and bias `[C]` fp32 -> the dtype of x. Triton on a GPU, else PyTorch.
    """
    if x.is_cuda and triton is not None:
        return _NormSilu.apply(x, weight, bias, silu)
    y = F.group_norm(x.float(), GROUPS, weight, bias, EPS)
    return (F.silu(y) if silu else y).to(x.dtype)
