"""Inputs and error measures shared by the CPU and GPU tests and by benchmarks/attention.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar.kernels.oracle import attention_oracle

DISTRIBUTIONS = ("normal", "hot", "cold", "equal", "ascending", "last_key")


class Inputs(NamedTuple):
    q: Tensor
    past_k: Tensor
    past_v: Tensor
    new_k: Tensor
    new_v: Tensor


def attention_inputs(
    distribution: str,
    sizes: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Inputs, float]:
    """Inputs with the given kind of scores, and the softmax scale. sizes = (N, P, L, R, H, D).

    normal: as most models. hot: cosine attention at its ceiling, scores from -100 to 100, some keys parallel to a
    query. cold: all scores within 1e-3. equal: one key repeated, H = log n. ascending: scores grow with the key, so
    that the running maximum moves with every block. last_key: nearly all weight on the last key.
    """
    n, past, new, r, h, d = sizes
    total = past + new
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(n, r, h, d), normal(total, r, h, d), normal(total, r, h, d)
    scale = d**-0.5
    if distribution == "hot":
        q, k, scale = 100.0 * F.normalize(q, dim=-1), F.normalize(k, dim=-1), 1.0
        for j in range(0, total, 7):
            k[j] = F.normalize(q[j % n], dim=-1) * (1 if j % 2 else -1)
    elif distribution == "cold":
        q, k = q * 1e-2, k * 1e-2
    elif distribution == "equal":
        k = k[:1].expand(total, r, h, d).clone()
    elif distribution in ("ascending", "last_key"):
        direction = F.normalize(normal(1, r, h, d), dim=-1)
        steps = torch.linspace(-3.0, 3.0, total) if distribution == "ascending" else torch.zeros(total)
        if distribution == "last_key":
            steps[-1] = 12.0
        q = 2.0 * direction + 0.05 * q / d**0.5
        k, scale = steps[:, None, None, None] * direction, 1.0
    elif distribution != "normal":
        raise ValueError(distribution)
    parts = (q, k[:past], v[:past], k[past:], v[past:])
    return Inputs(*(t.to(dtype).to(device).contiguous() for t in parts)), scale


def plain_attention(x: Inputs, scale: float) -> Tensor:
    """What PyTorch gives in the same precision with nothing fused: the error to compare with."""
    k = torch.cat([x.past_k, x.new_k]).permute(1, 2, 3, 0)
    v = torch.cat([x.past_v, x.new_v]).permute(1, 2, 0, 3)
    scores = (x.q.permute(1, 2, 0, 3) @ k) * scale
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3)


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float64; NaN if anything is NaN."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


class Errors(NamedTuple):
    """Errors against the float64 oracle: relative for out, nats for entropy and lse; `plain` is PyTorch's for out."""

    out: float
    entropy: float
    lse: float
    plain: float


def attention_errors(x: Inputs, scale: float, out: Tensor, entropy: Tensor, lse: Tensor) -> Errors:
    """entropy and lse per head [R,H,N]."""
    wanted, wanted_entropy, wanted_lse = attention_oracle(*x, scale)
    return Errors(
        relative(out, wanted),
        float((entropy.double() - wanted_entropy).abs().max()),
        float((lse.double() - wanted_lse).abs().max()),
        relative(plain_attention(x, scale), wanted),
    )
