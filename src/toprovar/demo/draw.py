"""Drawing primitives of the demo pictures: random numbers by index, colours in OKLCH, signed distances, soft edges.

Everything is vectorised over a batch of `n` pictures and runs on any torch device. Coordinates: x to the right and y
down, both in (-1, 1) over a square picture, so one pixel is `2 / size` wide. A signed distance is negative inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NUMBERS = 64
"""Uniform random numbers every picture owns."""

_BLOCK = 256  # pictures that share one generator: a picture depends on its seed alone, and drawing stays vectorised


def uniforms(seeds: np.ndarray | Sequence[int], stream: int = 0) -> np.ndarray:
    """Return `[n, NUMBERS]` float32 in [0, 1), a function of each seed (and the stream) alone.

    Picture `seed` owns row `seed % 256` of the generator numbered `(stream, seed // 256)`.

    Raises:
        ValueError: a seed is negative.
    """
    seeds = np.asarray(seeds, dtype=np.int64)
    if seeds.size and seeds.min() < 0:
        raise ValueError(f"seeds must not be negative, found {int(seeds.min())}")
    blocks, rows = seeds // _BLOCK, seeds % _BLOCK
    out = np.empty((len(seeds), NUMBERS), dtype=np.float32)
    for block in np.unique(blocks):
        table = np.random.default_rng([stream, int(block)]).random((_BLOCK, NUMBERS), dtype=np.float32)
        here = blocks == block
        out[here] = table[rows[here]]
    return out


def mix(low: float, high: float, u: Tensor) -> Tensor:
    """Map `u` in [0, 1) linearly to [low, high)."""
    return low + (high - low) * u


def pixels(size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return pixel centres x `[1, 1, size]` and y `[1, size, 1]` in (-1, 1)."""
    line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    return line.view(1, 1, size), line.view(1, size, 1)


def place(x: Tensor, y: Tensor, centre_x: Tensor, centre_y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Move the origin to the centre and turn the axes by `angle` (radians); parameters `[n]`, results `[n, h, w]`."""
    x, y = x - centre_x.view(-1, 1, 1), y - centre_y.view(-1, 1, 1)
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    return x * cos + y * sin, y * cos - x * sin


def cover(distance: Tensor, size: int, blur: float | Tensor = 0.0) -> Tensor:
    """Return the coverage in [0, 1] of a signed distance: one pixel of anti-aliasing, or `blur` units of softness."""
    if isinstance(blur, float) and blur == 0.0:
        return (0.5 - distance * (size / 2)).clamp(0.0, 1.0)
    step = (0.5 - distance / blur).clamp(0.0, 1.0)
    return step * step * (3.0 - 2.0 * step)


def over(ground: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    """Lay `colour` (`[n, 3, 1, 1]` or `[n, 3, h, w]`) over `ground` `[n, 3, h, w]` with `alpha` `[n, h, w]`."""
    return ground + (colour - ground) * alpha.unsqueeze(1)


def oklch(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Tensor:
    """Return sRGB `[..., 3]` in [0, 1] of OKLCH (hue in turns); out-of-gamut colours are clipped.

    Source: the OKLab matrices as published by B. Ottosson (2020). Equal lightness looks equally light in every hue,
    which is what makes random palettes agree.
    """
    a, b = chroma * torch.cos(2 * math.pi * hue), chroma * torch.sin(2 * math.pi * hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = torch.stack(
        (
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ),
        dim=-1,
    ).clamp(0.0, 1.0)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055)


def flat(colour: Tensor) -> Tensor:
    """Shape a colour `[n, 3]` as `[n, 3, 1, 1]`."""
    return colour[:, :, None, None]


# ---- signed distances. x, y: [n, h, w]; sizes: [n]. Formulas after I. Quilez, "2D distance functions". ----


def disc(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a disc."""
    return torch.sqrt(x * x + y * y) - radius.view(-1, 1, 1)


def ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a ring whose outer radius is `radius`."""
    r = radius.view(-1, 1, 1)
    return (torch.sqrt(x * x + y * y) - 0.74 * r).abs() - 0.26 * r


def square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a square with slightly rounded corners, of about the area of a disc of `radius`."""
    r = radius.view(-1, 1, 1)
    half, corner = 0.87 * r, 0.10 * r
    dx, dy = x.abs() - (half - corner), y.abs() - (half - corner)
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2)
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to an equilateral triangle, point up, with slightly rounded corners."""
    r = 1.02 * radius.view(-1, 1, 1)
    k, corner = math.sqrt(3.0), 0.08 * r
    px, py = x.abs() - r, -y + r / k
    fold = px + k * py > 0
    px, py = torch.where(fold, (px - k * py) / 2, px), torch.where(fold, (-k * px - py) / 2, py)
    px = px - torch.minimum(torch.maximum(px, -2 * r), torch.zeros_like(px))
    return -torch.sqrt(px * px + py * py) * torch.sign(py) - corner


def star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a five-pointed star, point up."""
    r = 1.18 * radius.view(-1, 1, 1)
    kx, ky = 0.809016994375, -0.587785252292
    px, py = x.abs(), -y
    fold = 2 * (kx * px + ky * py).clamp(min=0)
    px, py = px - fold * kx, py - fold * ky
    fold = 2 * (-kx * px + ky * py).clamp(min=0)
    px, py = px + fold * kx, py - fold * ky
    px, py = px.abs(), py - r
    inner = 0.52
    bx, by = inner * -ky, inner * kx - 1.0
    along = ((px * bx + py * by) / (bx * bx + by * by)).clamp(min=0)
    along = torch.minimum(along, r)
    qx, qy = px - bx * along, py - by * along
    return torch.sqrt(qx * qx + qy * qy) * torch.sign(py * bx - px * by)


def heart(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a heart, point down."""
    r = 1.62 * radius.view(-1, 1, 1)
    px, py = x.abs() / r, -y / r + 0.55
    lobe = torch.sqrt((px - 0.25) ** 2 + (py - 0.75) ** 2) - math.sqrt(2.0) / 4
    half = 0.5 * (px + py).clamp(min=0)
    body = torch.sqrt(torch.minimum(px**2 + (py - 1) ** 2, (px - half) ** 2 + (py - half) ** 2)) * torch.sign(px - py)
    return torch.where(py + px > 1, lobe, body) * r


def stripe(t: Tensor, period: Tensor, duty: float | Tensor = 0.5) -> Tensor:
    """Signed distance along `t` to the bands `|t mod period| < duty * period / 2`."""
    p = period.view(-1, 1, 1)
    width = duty.view(-1, 1, 1) if isinstance(duty, Tensor) else duty
    return ((t / p - torch.round(t / p)).abs() - width / 2) * p


def checker(x: Tensor, y: Tensor, cell: Tensor) -> Tensor:
    """Signed distance to the dark cells of a checkerboard with cells of side `cell`."""
    dx, dy = stripe(x, 2 * cell), stripe(y, 2 * cell)
    near = torch.minimum(dx.abs(), dy.abs())
    return torch.where(dx * dy > 0, -near, near)


def dots(x: Tensor, y: Tensor, period: Tensor, radius: float | Tensor = 0.3) -> Tensor:
    """Signed distance to round dots in a hexagonal arrangement; `radius` is in periods."""
    p = period.view(-1, 1, 1)
    r = radius.view(-1, 1, 1) if isinstance(radius, Tensor) else radius
    k = math.sqrt(3.0)
    u, v = x / p, y / p
    first = torch.sqrt((u - torch.round(u)) ** 2 + (v - k * torch.round(v / k)) ** 2)
    second = torch.sqrt((u - 0.5 - torch.round(u - 0.5)) ** 2 + (v - k / 2 - k * torch.round(v / k - 0.5)) ** 2)
    return (torch.minimum(first, second) - r) * p
