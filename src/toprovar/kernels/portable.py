"""The ops in plain PyTorch: the CPU implementation, and what a GPU runs when it has no Triton.

Inputs are checked by `ops.py`. Softmax and entropy are fp32 whatever the tensors are: in fp16 p log p gives NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["entropy_attention", "gather_tokens", "restore_tokens", "scatter_tokens", "select_tokens"]

_SCORE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Memory for one chunk of fp32 scores, so that 4096 queries on 10521 keys need no 5 GB matrix."""


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
    """Returns (out [N,R,H,D], entropy [R,N] or [R,H,N] or [0], lse [R,H,N] or [0])."""
    n, r, h, _ = q.shape
    k = torch.cat([past_k, new_k]).permute(1, 2, 0, 3)
    v = torch.cat([past_v, new_v]).permute(1, 2, 0, 3)
    queries = q.permute(1, 2, 0, 3)
    # Two tensors: the outputs of an op must not share memory, empty or not.
    no_entropy, no_lse = q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)
    if entropy == "none" and not return_lse:
        out = F.scaled_dot_product_attention(queries, k, v, scale=scale)
        return out.permute(2, 0, 1, 3).contiguous(), no_entropy, no_lse

    out = q.new_empty(q.shape)
    head_entropy = q.new_empty((r, h, n), dtype=torch.float32)
    lse = q.new_empty((r, h, n), dtype=torch.float32)
    keys_t, values = k.float().mT, v.float()
    chunk = max(1, _SCORE_BYTES.get(q.device.type, 64 << 20) // (4 * r * h * k.shape[2]))
    for start in range(0, n, chunk):
        piece = slice(start, min(start + chunk, n))
        s = (queries[:, :, piece].float() * scale) @ keys_t
        highest = s.amax(-1, keepdim=True)
        s -= highest
        p = s.exp()
        total = p.sum(-1, keepdim=True)
        out[piece] = ((p @ values) / total).permute(2, 0, 1, 3).to(q.dtype)
        # Centred form H = log l - u/l with u = sum p (s - max): exact to fp32 however large the scores (paper.md 2.2).
        u = s.mul_(p).sum(-1)
        log_total = total.log().squeeze(-1)
        head_entropy[:, :, piece] = log_total - u / total.squeeze(-1)
        lse[:, :, piece] = highest.squeeze(-1) + log_total
    given = {"none": no_entropy, "mean": head_entropy.mean(1), "head": head_entropy}[entropy]
    return out, given, lse if return_lse else no_lse


def select_tokens(entropy: Tensor, keep: int) -> Tensor:
    """entropy [B,N] -> int32 [B,keep]; torch sorts NaN behind everything and a stable sort leaves ties in order."""
    order = entropy.sort(dim=1, stable=True).indices[:, :keep]
    return order.sort(dim=1).values.to(torch.int32)


def _by_row(indices: Tensor, rows: int, channels: int) -> Tensor:
    """indices [B,K] -> int64 [K,R,C] for gather and scatter along dim 0."""
    images, keep = indices.shape
    per_row = indices.long().repeat(rows // images, 1)
    return per_row.t().unsqueeze(-1).expand(keep, rows, channels)


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """x [N,R,C], indices [B,K] -> [K,R,C]."""
    return x.gather(0, _by_row(indices, x.shape[1], x.shape[2]))


def scatter_tokens(x: Tensor, kept: Tensor, indices: Tensor) -> Tensor:
    """x [N,R,C], kept [K,R,C], indices [B,K] -> [N,R,C]."""
    return x.scatter(0, _by_row(indices, x.shape[1], x.shape[2]), kept)


def restore_tokens(x: Tensor, kept: Tensor, indices: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x [N,R,C], cache [hc*wc,R,C], rows [h,hc], cols [w,wc] -> [N,R,C]; the resize is two small matrix products."""
    n, r, c = x.shape
    (h, hc), wc = rows.shape, cols.shape[1]
    tall = rows @ cache.float().reshape(hc, wc * r * c)
    grid = cols @ tall.reshape(h, wc, r * c)
    y = (x.float() + grid.reshape(n, r, c)).to(x.dtype)
    return y.scatter_(0, _by_row(indices, r, c), kept)
