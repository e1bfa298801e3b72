"""Launches the Triton kernels on torch CUDA tensors. `ops.py` checks the inputs; nothing here waits for the device."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from . import contract, triton_kernels, tuning

__all__ = ["entropy_attention", "gather_tokens", "mean_heads", "restore_tokens", "select_tokens", "supports"]

_LOG2_E = 1.4426950408889634


@cache
def _device(index: int) -> tuple[int | None, int]:
    """(architecture of the tuning table or None, multiprocessors) of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return tuning.nearest_arch(properties.major * 10 + properties.minor), properties.multi_processor_count


def supports(device: torch.device, head_dim: int | None = None) -> bool:
    """Whether these kernels run on this device, and for attention on heads of this size."""
    arch, _ = _device(device.index if device.index is not None else torch.cuda.current_device())
    return arch is not None and (head_dim is None or (head_dim % 8 == 0 and head_dim <= contract.MAX_HEAD_DIM))


def _aligned(tensor: Tensor, dense: int) -> Tensor:
    """The tensor itself if its last `dense` axes are dense and everything starts at 16 bytes, else a dense copy.

    Views into a fused projection or a cache pass as they are; only odd offsets and transposed heads are copied.
    """
    inner = 1
    fits = tensor.data_ptr() % 16 == 0
    for axis in range(tensor.dim() - 1, -1, -1):
        if axis >= tensor.dim() - dense:
            fits = fits and (tensor.stride(axis) == inner or tensor.shape[axis] == 1)
            inner *= tensor.shape[axis]
        else:
            fits = fits and tensor.stride(axis) % 8 == 0
    return tensor if fits else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def entropy_attention(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    scale: float,
    entropy: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the torch op: (out [N,R,H,D], entropy or [0], lse or [0]); see contract.py."""
    with torch.cuda.device(q.device):
        return _entropy_attention(q, past_k, past_v, new_k, new_v, scale, entropy, return_lse)


def _entropy_attention(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    scale: float,
    entropy: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, r, h, d = q.shape
    n_past, n_new = past_k.shape[0], new_k.shape[0]
    arch, sm_count = _device(q.device.index)
    assert arch is not None, "ops.py asks supports() first"
    dtype = str(q.dtype).removeprefix("torch.")
    config = tuning.choose(arch, dtype, d, n, n_past + n_new, r * h, sm_count)
    tile = config.tile
    tensors = [_aligned(t, 2) for t in (q, past_k, past_v, new_k, new_v)]
    strides = [t.stride(axis) // 8 for t in tensors for axis in (0, 1)]
    d0, d1 = tuning.split_head_dim(arch, d)
    split = config.splits > 1

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = floats(r, h, n) if return_lse else floats(0)
    per_head = floats(r, h, n) if entropy != "none" and not split else floats(0)
    target = floats(config.splits, n, r, h, d) if split else out
    stats = floats(3, config.splits, n, r, h) if split else floats(0)
    triton_kernels.attention_kernel[(triton.cdiv(n, tile.block_m), r * h, config.splits)](
        *tensors, target, per_head, lse, stats,
        scale * _LOG2_E, n, n_past, n_new, r, h, config.keys_per_split, *strides,
        D=d, D0=d0, D1=d1, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        ENTROPY=split or entropy != "none", LSE=return_lse and not split, SPLIT=split,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if not split:
        return out, mean_heads(per_head) if entropy == "mean" else per_head, lse

    merged = floats(*{"none": (0,), "mean": (r, n), "head": (r, h, n)}[entropy])
    triton_kernels.merge_kernel[(n, r)](
        target, stats, out, merged, lse, n, r, h, config.splits, d // 8,
        D_PAD=contract.MAX_HEAD_DIM, HEADS_PAD=tuning.heads_pad(h),
        ENTROPY=contract.ENTROPY_MODES[entropy], LSE=return_lse, num_warps=tuning.MERGE_WARPS,
    )  # fmt: skip
    return out, merged, lse


def mean_heads(per_head: Tensor) -> Tensor:
    """Mean over heads, [R,H,N] fp32 -> [R,N]: a small kernel that adds in a fixed order: equal inputs, equal bits.

    An atomic add inside the attention kernel would save this launch and lose that: the selection would change from run
    to run. A loop over heads inside one program would lose 15 of 16 programs. It reads 4 R H N bytes, 0.5 MB at 4096.
    """
    r, h, n = per_head.shape
    mean = torch.empty((r, n), dtype=torch.float32, device=per_head.device)
    triton_kernels.mean_heads_kernel[(triton.cdiv(n, tuning.MEAN_BLOCK), r)](
        per_head, mean, n, h, HEADS_PAD=tuning.heads_pad(h), BLOCK=tuning.MEAN_BLOCK, num_warps=tuning.MEAN_WARPS
    )
    return mean


def select_tokens(entropy: Tensor, keep: int) -> Tensor:
    """entropy [B,N] fp32, N <= contract.MAX_SELECT_TOKENS -> int32 [B,keep], ascending."""
    images, n = entropy.shape
    block = next(size for size in tuning.SELECT_BLOCKS if n <= size)
    indices = torch.empty((images, keep), dtype=torch.int32, device=entropy.device)
    with torch.cuda.device(entropy.device):
        triton_kernels.select_kernel[(images,)](
            entropy.contiguous(), indices, n, keep, BLOCK=block, num_warps=tuning.SELECT_BLOCKS[block]
        )
    return indices


def _unit(*tensors: Tensor) -> int:
    """8 when the width and every address allow 16-byte accesses, else 1."""
    return 8 if all(t.shape[-1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in tensors) else 1


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """x [N,R,C], indices [B,K] int32 -> [K,R,C]."""
    x, indices = x.contiguous(), indices.contiguous()
    (n, r, c), (images, keep) = x.shape, indices.shape
    kept = torch.empty((keep, r, c), dtype=x.dtype, device=x.device)
    block_c, warps = tuning.TOKEN_BLOCK
    unit = _unit(x, kept)
    with torch.cuda.device(x.device):
        triton_kernels.gather_kernel[(keep * r, triton.cdiv(c, block_c))](
            x, indices, kept, n, r, images, keep, c // unit, UNIT=unit, BLOCK_C=block_c, num_warps=warps
        )
    return kept


@cache
def _span(size: int, source: int) -> int:
    """Most source cells under one cell of an area resize source -> size."""
    return max(-(-(i + 1) * source // size) - i * source // size for i in range(size))


def restore_tokens(
    x: Tensor, kept: Tensor, indices: Tensor, delta: Tensor | None, grid: tuple[int, int, int, int]
) -> Tensor:
    """x [N,R,C], kept [K,R,C], indices [B,K], delta [hc*wc,R,C] or None (scatter only); grid = (h, w, hc, wc)."""
    x, kept, indices = x.contiguous(), kept.contiguous(), indices.contiguous()
    (n, r, c), (images, keep) = x.shape, indices.shape
    y = torch.empty_like(x)
    source = x if delta is None else delta.contiguous()
    h, w, hc, wc = grid
    block_c, warps = tuning.TOKEN_BLOCK
    unit = _unit(x, kept, source, y)
    spans = _span(h, hc), _span(w, wc)
    resize = 0 if delta is None else 1 if max(spans) <= 2 else 2
    with torch.cuda.device(x.device):
        triton_kernels.restore_kernel[(n * r, triton.cdiv(c, block_c))](
            x, kept, indices, source, y, r, images, keep, c // unit, h, w, hc, wc, *spans,
            CACHE=resize, UNIT=unit, BLOCK_C=block_c, SAMPLES=tuning.RESTORE_SAMPLES, num_warps=warps,
        )  # fmt: skip
    return y
