"""Float64 oracles of every op: two passes, no cleverness, on any device. Tests and benchmarks import these.

Layouts are those of `contract.py`; results stay float64 (indices int32).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "area_matrix",
    "attention_oracle",
    "entropy_from_values",
    "gather_oracle",
    "restore_oracle",
    "scatter_oracle",
    "select_oracle",
]


def attention_oracle(
    q: Tensor, past_k: Tensor, past_v: Tensor, new_k: Tensor, new_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, entropy and log-sum-exp of every query and head.

    Args: q [N,R,H,D]; past_k, past_v [P,R,H,D]; new_k, new_v [L,R,H,D]; `scale` multiplies q.k.
    Returns: out [N,R,H,D], entropy [R,H,N] in nats, lse [R,H,N].
    """
    k = torch.cat([past_k, new_k]).double().permute(1, 2, 3, 0)
    v = torch.cat([past_v, new_v]).double().permute(1, 2, 0, 3)
    scores = (q.double().permute(1, 2, 0, 3) @ k) * scale
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    # A key whose probability underflows even in float64 contributes 0, as the limit of p log p does.
    entropy = -(torch.where(p > 0, log_p, 0.0) * p).sum(-1)
    return (p @ v).permute(2, 0, 1, 3).contiguous(), entropy, torch.logsumexp(scores, -1)


def entropy_from_values(
    q: Tensor, past_k: Tensor, past_v: Tensor, new_k: Tensor, new_v: Tensor, scale: float
) -> Tensor:
    """Entropy [R,H,N] by the identity H = LSE - scale * q . (P K): attention with K for values (paper.md 2.3).

    An independent second way to the oracle's number: it never forms p log p.
    """
    keys_out, _, lse = attention_oracle(q, past_k, past_k, new_k, new_k, scale)
    return lse - scale * (q.double() * keys_out).sum(-1).permute(1, 2, 0)


def select_oracle(entropy: Tensor, keep: int) -> Tensor:
    """The `keep` lowest of entropy [B,N]: int32 [B,keep], ascending by index; ties to the lower index, NaN highest."""
    rows = []
    for values in entropy.double().tolist():
        order = sorted(range(len(values)), key=lambda i: (1, 0.0, i) if math.isnan(values[i]) else (0, values[i], i))
        rows.append(sorted(order[:keep]))
    return torch.tensor(rows, dtype=torch.int32, device=entropy.device).reshape(entropy.shape[0], keep)


def gather_oracle(x: Tensor, indices: Tensor) -> Tensor:
    """kept[k, r] = x[indices[r % B, k], r]; x [N,R,C], indices [B,K] -> [K,R,C] in x's dtype (exact)."""
    images = indices.shape[0]
    columns = [x[indices[r % images].long(), r] for r in range(x.shape[1])]
    return torch.stack(columns, dim=1)


def scatter_oracle(x: Tensor, kept: Tensor, indices: Tensor) -> Tensor:
    """A copy of x [N,R,C] whose tokens indices[r % B] of row r are kept[:, r] (exact)."""
    y = x.clone()
    for r in range(x.shape[1]):
        y[indices[r % indices.shape[0]].long(), r] = kept[:, r]
    return y


def area_matrix(size: int, source: int) -> Tensor:
    """Matrix [size, source] of adaptive average ("area") resizing along one axis, float64.

    Bin i covers source cells floor(i * source / size) .. ceil((i+1) * source / size) - 1 with equal weights, as
    torch.nn.functional.adaptive_avg_pool1d and interpolate(mode="area") do, for enlarging too.
    """
    matrix = torch.zeros(size, source, dtype=torch.float64)
    for i in range(size):
        first, last = i * source // size, -((-(i + 1) * source) // size)
        matrix[i, first:last] = 1.0 / (last - first)
    return matrix


def restore_oracle(x: Tensor, kept: Tensor, indices: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x + resize(cache) in float64, kept rows written over it. Shapes as RestoreTokens in contract.py."""
    (h, hc), (w, wc) = rows.shape, cols.shape
    _, r, c = cache.shape
    grid = torch.einsum("ij,jkrc,lk->ilrc", rows.double(), cache.double().reshape(hc, wc, r, c), cols.double())
    return scatter_oracle(x.double() + grid.reshape(h * w, r, c), kept.double(), indices)
