"""Matrix products of few rows, and launches that overlap.

The first scales have 2 to 128 rows: their products cost what reading the weights costs, and cuBLAS, whose tiles are wide,
leaves part of the memory's speed unused where the result is narrow. `thin_linear` cuts the sum over K into parts, so that
enough programs read; the kernel behind it adds the parts up in passing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["THIN_ROWS", "launch_options", "overlaps", "thin_linear"]

THIN_ROWS = 128
"""Most rows of `thin_linear`."""


@triton.jit
def _thin_linear(
    X,
    W,
    Y,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
    length: tl.constexpr = K // PARTS
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * length
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    weights = W + n.to(tl.int64) * K + first
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in tl.range(0, length, BLOCK_K, num_stages=STAGES):
        w = tl.load(weights[:, None] + start + k[None, :])
        x = tl.load(X + m[None, :] * K + first + start + k[:, None], mask=(m < M)[None, :], other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")  # of fp32, in tests
    if OVERLAP:
        gdc_launch_dependents()
    y = Y + tl.program_id(1) * M * N + m[None, :] * N + n[:, None]
    tl.store(y, total, mask=(m < M)[None, :])


def thin_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` for few rows, in parts to be added up by a kernel that does so while it reads.

    Args:
        x: ``[M, K]`` fp16 or bf16, contiguous, M at most `THIN_ROWS`.
        weight: ``[N, K]`` of the same dtype.

    Returns: fp32 ``[parts, M, N]``.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if rows > THIN_ROWS:
        raise ValueError(f"{rows} rows: a thin product has at most {THIN_ROWS}")
    # What was fastest on an H200 of a dozen cuts for the shapes of Infinity 2B; docs/log.md has some.
    large = outputs > inputs or inputs > 4096
    tile, block, parts = (128, 64, 8) if large else (64, 128, 4)
    tile, block = _divisor(outputs, tile), _divisor(inputs, block)
    while inputs % (parts * block):
        parts //= 2
    y = torch.empty((parts, rows, outputs), dtype=torch.float32, device=x.device)
    overlap = overlaps(x)
    _thin_linear[(outputs // tile, parts)](
        x,
        weight,
        y,
        rows,
        N=outputs,
        K=inputs,
        ROWS=max(16, triton.next_power_of_2(rows)),
        OUTPUTS=tile,
        BLOCK_K=block,
        PARTS=parts,
        OVERLAP=overlap,
        STAGES=4,
        num_warps=4,
        **launch_options(overlap),
    )
    return y


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(most, size & -size)


def overlaps(tensor: Tensor) -> bool:
    """Whether a kernel on this tensor's device may be set up beside the one before it: Hopper and later."""
    return tensor.is_cuda and _capability(tensor.device.index) >= 9


def launch_options(overlap: bool) -> dict[str, bool]:
    """Options of a launch that may be set up beside the kernel before it."""
    return {"launch_pdl": True} if overlap else {}


@functools.cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]
