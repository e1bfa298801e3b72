"""Matrix products of few rows, launches that overlap, and weights asked for ahead of their product.

The first scales have 2 to 32 rows: their products cost what reading the weights costs, and cuBLAS, whose tiles are wide,
leaves part of the memory's speed unused. `thin_linear` cuts the sum over K into parts, so that enough programs read; the
kernel behind it adds the parts up in passing. Weights depend on nothing, so they need not wait for the kernel before:
a thin product loads its first ones while that still runs, and the small kernels between products bring the first megabytes of
the next product's weights into L2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["THIN_ROWS", "ahead", "launch_options", "overlaps", "prefetch", "thin_linear"]

THIN_ROWS = 32
"""Most rows of `thin_linear`."""

_AHEAD_BYTES = 16 << 20
"""Of a product's weights that are asked for ahead: what the memory delivers while a small kernel runs."""
_AHEAD_ROWS = 1600
"""Most rows of a product whose weights are: with more, it is bound by arithmetic."""
_PROGRAMS = 224
"""Least programs of a thin product; with fewer, some multiprocessors of an H100 read more than others."""


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
    length: tl.constexpr = K // PARTS
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * length
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    weights = W + n.to(tl.int64)[:, None] * K + first + k[None, :]
    inputs = X + m[None, :] * K + first + k[:, None]
    inside = (m < M)[None, :]
    first_weights = tl.load(weights)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in tl.range(BLOCK_K, length, BLOCK_K, num_stages=STAGES):
        w = tl.load(weights + start)
        x = tl.load(inputs + start, mask=inside, other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")  # of fp32, in tests
    x = tl.load(inputs, mask=inside, other=0.0)
    total = tl.dot(first_weights, x, total, input_precision="ieee")
    y = Y + tl.program_id(1) * M * N + m[None, :] * N + n[:, None]
    tl.store(y, total, mask=inside)


def thin_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` for few rows, in parts to be added up by a kernel that does so while it reads.

    Args:
        x: ``[M, K]`` fp16 or bf16, contiguous, M at most `THIN_ROWS`.
        weight: ``[N, K]`` of the same dtype, written by no kernel that may still run.

    Returns: fp32 ``[parts, M, N]``.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if rows > THIN_ROWS:
        raise ValueError(f"{rows} rows: a thin product has at most {THIN_ROWS}")
    # From a search over some 50 cuts on an H100, the shapes of Infinity 2B and 8B.
    tile, block = _divisor(outputs, 64), _divisor(inputs, 256 if rows <= 16 else 128)
    blocks = inputs // block
    parts = next((n for n in range(1, blocks) if blocks % n == 0 and outputs // tile * n >= _PROGRAMS), blocks)
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
        STAGES=2 if block > 128 else 4,
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


@triton.jit
def prefetch(NEXT, size_bytes, programs):
    """Asks for this program's share of the bytes at NEXT to be brought into L2, a multiple of 16; waits for nothing."""
    share = tl.cdiv(size_bytes, programs * 128) * 128
    first = tl.program_id(0).to(tl.int64) * share
    left = tl.minimum(size_bytes - first, share).to(tl.int32)
    if left > 0:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first_thread;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first_thread, thread, 0;
            @first_thread cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [NEXT.to(tl.int64, bitcast=True) + first, left],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def ahead(rows: int, weight: Tensor | None) -> tuple[int, int]:
    """How many bytes of the weights of a product of so many rows to ask for, and the programs that it takes at least."""
    if weight is None or rows > _AHEAD_ROWS or not overlaps(weight) or weight.data_ptr() % 16:
        return 0, 0
    size_bytes = weight.numel() * weight.element_size() // 16 * 16  # dense, so all of these are the weight's own
    return min(size_bytes, _AHEAD_BYTES), _multiprocessors(weight.device.index)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]
