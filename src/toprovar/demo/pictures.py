"""The pictures the demo checkpoint learns: twelve named classes in three prompt classes, drawn from a seed.

    plain    gradient, horizon, glow, dunes        large smooth areas, little for late scales to add
    object   disc, square, triangle, star          one bold thing on a quiet ground
    texture  stripes, checker, dots, bricks        detail everywhere

A picture is a function of (label, seed, size): its parameters are drawn on the CPU by numpy, its pixels are computed
by torch on any device, in batches. Seeds below `HELD_OUT` are for training, seeds from there on for judging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from toprovar.demo import draw
from toprovar.demo.draw import cover, flat, mix, over
from toprovar.demo.labels import CLASSES, PROMPT_CLASS

__all__ = ["CLASSES", "HELD_OUT", "PROMPT_CLASS", "render"]

HELD_OUT = 1 << 40
"""First seed that no training run has seen."""


class _Numbers:
    """The random numbers of a batch, taken one column at a time; the order of taking is part of a class's look."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.next = table, 0

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return `[n]` uniform in [low, high)."""
        self.next += 1
        return mix(low, high, self.table[:, self.next - 1])

    def choice(self, values: Sequence[float]) -> Tensor:
        """Return `[n]`, each one of the values."""
        return torch.tensor(values, device=self.table.device)[(self() * len(values)).long()]


_HUES = (0.075, 0.165, 0.265, 0.400, 0.520, 0.680, 0.800, 0.950)
"""Red, orange, yellow, green, teal, blue, violet, pink, in turns: few enough for a small model to get them right."""


def _hue(u: _Numbers) -> tuple[Tensor, Tensor]:
    """Return a hue of the palette and a companion (a neighbour, or one across the circle), in turns."""
    hues = torch.tensor(_HUES, device=u.table.device)
    base = (u() * len(_HUES)).long()
    other = (base + u.choice((1, 3, 4, 5, 7)).long()) % len(_HUES)
    return hues[base] + u(-0.01, 0.01), hues[other] + u(-0.01, 0.01)


def _vivid(hue: Tensor, chroma: Tensor, darker: float = 0.0) -> Tensor:
    """Return the colour of a hue at the lightness where it is strongest: light for yellow, dark for blue."""
    return draw.oklch(0.66 + 0.13 * torch.cos(2 * math.pi * (hue - 0.28)) - darker, chroma, hue)


def _quiet_ground(u: _Numbers, hue: Tensor, x: Tensor, y: Tensor, light: Tensor) -> Tensor:
    """Return `[n, 3, h, w]`: a soft slope of one hue between two near lightnesses, across a random direction."""
    angle = u(0.0, 2 * math.pi)
    slope, _ = draw.place(x, y, torch.zeros_like(angle), torch.zeros_like(angle), angle)
    slope = (0.5 + slope * 0.35).clamp(0, 1)
    chroma = u(0.04, 0.07)
    near, far = draw.oklch(light, chroma, hue), draw.oklch(light - u(0.07, 0.14), chroma * 1.2, hue + u(-0.04, 0.04))
    return flat(near) + (flat(far) - flat(near)) * slope.unsqueeze(1)


def _gradient(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    hue, other = _hue(u)
    angle = math.pi / 2 + u(-0.45, 0.45)
    slope, _ = draw.place(x, y, torch.zeros_like(angle), torch.zeros_like(angle), angle)
    t = (0.5 + slope * u(0.38, 0.5).view(-1, 1, 1)).clamp(0, 1)
    middle = u(0.35, 0.65).view(-1, 1, 1)
    top = draw.oklch(u(0.40, 0.52), u(0.11, 0.15), hue)
    centre = draw.oklch(u(0.66, 0.74), u(0.10, 0.14), other)
    bottom = draw.oklch(u(0.88, 0.94), u(0.05, 0.08), other)
    first, second = (t / middle).clamp(0, 1), ((t - middle) / (1 - middle)).clamp(0, 1)
    first, second = first * first * (3 - 2 * first), second * second * (3 - 2 * second)
    return over(over(flat(top).expand(-1, -1, size, size), flat(centre), first), flat(bottom), second)


def _horizon(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    hue, other = _hue(u)
    down = draw.place(x, y, torch.zeros_like(hue), u(-0.35, 0.45), u(-0.16, 0.16))[1]
    haze = torch.exp(-down.abs() * u(1.2, 2.6).view(-1, 1, 1))
    sky = flat(draw.oklch(u(0.74, 0.82), u(0.08, 0.11), hue)) + haze.unsqueeze(1) * u(0.06, 0.16).view(-1, 1, 1, 1)
    land = draw.oklch(u(0.34, 0.46), u(0.08, 0.12), other)
    land = flat(land) + haze.unsqueeze(1) * u(0.05, 0.14).view(-1, 1, 1, 1)
    return over(sky, land, cover(-down, size)).clamp(0, 1)


def _glow(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    hue, other = _hue(u)
    ground = _quiet_ground(u, hue, x, y, u(0.28, 0.36))
    px, py = draw.place(x, y, u(-0.45, 0.45), u(-0.45, 0.45), u(0.0, math.pi))
    reach, stretch = u(0.28, 0.42).view(-1, 1, 1), u(1.0, 1.3).view(-1, 1, 1)
    distance = torch.sqrt((px / stretch) ** 2 + (py * stretch) ** 2) / reach
    halo, core = torch.exp(-0.5 * distance**2), torch.exp(-2.2 * distance**2)
    picture = over(ground, flat(_vivid(other, u(0.14, 0.17))), halo)
    return over(picture, flat(draw.oklch(u(0.90, 0.96), u(0.03, 0.07), other + 0.03)), core)


def _dunes(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    hue, other = _hue(u)
    light = u(0.84, 0.92)
    picture = flat(draw.oklch(light, u(0.03, 0.06), other)) - (0.07 * (y + 1)).unsqueeze(1).expand(-1, -1, size, size)
    chroma, turn, drop = u(0.10, 0.14), u(-0.08, 0.08), u(0.105, 0.125)
    tilt = u(-0.15, 0.15).view(-1, 1, 1)
    for layer in range(4):
        height = -0.42 + 0.40 * layer + u(-0.06, 0.06)
        wave = torch.zeros_like(x)
        for high, slow, fast in ((u(0.10, 0.17), 1.5, 3.0), (u(0.02, 0.05), 3.5, 6.0)):
            phase = x * u(slow, fast).view(-1, 1, 1) + u(0.0, 6.28).view(-1, 1, 1)
            wave = wave + high.view(-1, 1, 1) * torch.sin(phase)
        down = y - height.view(-1, 1, 1) - wave - tilt * x
        colour = draw.oklch(light - 0.10 - drop * (layer + 1), chroma, hue + turn * layer * 0.5)
        shade = 0.10 * torch.exp(-down.clamp(min=0) * 4.0)  # light that catches the crest
        picture = over(picture, flat(colour) + shade.unsqueeze(1), cover(-down, size))
    return picture.clamp(0, 1)


def _object(shape: Callable[[Tensor, Tensor, Tensor], Tensor], turn: float) -> Callable[..., Tensor]:
    """Return the renderer of one bold shape with a soft shadow and a slope of light on it."""

    def paint(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
        hue, other = _hue(u)
        dark = u() < 0.4
        picture = _quiet_ground(u, hue, x, y, torch.where(dark, u(0.36, 0.42), u(0.90, 0.94)))
        radius = u(0.42, 0.60)
        reach = (0.90 - 1.12 * radius).clamp(min=0.0)
        cx, cy, angle = u(-1.0, 1.0) * reach, u(-1.0, 1.0) * reach, u(-turn, turn)
        drop = 0.10 * radius
        sx, sy = draw.place(x, y, cx + drop, cy + 1.4 * drop, angle)
        shadow = cover(shape(sx, sy, radius), size, blur=0.22)
        picture = picture * (1 - 0.42 * shadow.unsqueeze(1))
        px, py = draw.place(x, y, cx, cy, angle)
        distance = shape(px, py, radius)
        body = flat(_vivid(other, u(0.16, 0.19)))
        lit = ((cx.view(-1, 1, 1) - x + cy.view(-1, 1, 1) - y) / radius.view(-1, 1, 1)).clamp(-1.4, 1.4)
        body = body * (1 + 0.13 * lit.unsqueeze(1))
        rim = cover(-(distance + 0.035), size, blur=0.03)  # a lighter edge, so that outlines are worth late scales
        body = over(body, body * 0.72 + 0.28, rim)
        return over(picture, body, cover(distance, size)).clamp(0, 1)

    return paint


def _two_inks(u: _Numbers) -> tuple[Tensor, Tensor]:
    """Return two colours `[n, 3, 1, 1]` that stand apart in lightness."""
    hue, other = _hue(u)
    light = draw.oklch(u(0.86, 0.93), u(0.05, 0.09), hue)
    dark = _vivid(other, u(0.13, 0.17), darker=0.10)
    swap = (u() < 0.5).view(-1, 1)
    return flat(torch.where(swap, dark, light)), flat(torch.where(swap, light, dark))


def _lamp(u: _Numbers, picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Light a texture softly from one side."""
    px, py = draw.place(x, y, u(-0.6, 0.6), u(-0.6, 0.6), torch.zeros(len(picture), device=picture.device))
    return (picture * (1.06 - 0.13 * (px * px + py * py)).unsqueeze(1)).clamp(0, 1)


def _turned(u: _Numbers, x: Tensor, y: Tensor, angles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Turn the axes about the centre by one of the angles, give or take a degree.

    A texture is anchored at the centre and has one of a few periods: the tokens of a scale are drawn at once, so they
    can agree on a phase only if it is known before.
    """
    angle = u.choice(angles) + u(-0.02, 0.02)
    return draw.place(x, y, torch.zeros_like(angle), torch.zeros_like(angle), angle)


def _stripes(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    ground, ink = _two_inks(u)
    px, _ = _turned(u, x, y, (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4))
    alpha = cover(draw.stripe(px, u.choice((0.32, 0.40, 0.48)), u(0.44, 0.54)), size)
    return _lamp(u, over(ground.expand(-1, -1, size, size), ink, alpha), x, y)


def _checker(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    ground, ink = _two_inks(u)
    px, py = _turned(u, x, y, (0.0, math.pi / 4))
    alpha = cover(draw.checker(px, py, u.choice((0.20, 0.25))), size)
    return _lamp(u, over(ground.expand(-1, -1, size, size), ink, alpha), x, y)


def _dots(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    ground, ink = _two_inks(u)
    px, py = _turned(u, x, y, (0.0, math.pi / 6))
    alpha = cover(draw.dots(px, py, u.choice((0.34, 0.44)), u(0.28, 0.34)), size)
    return _lamp(u, over(ground.expand(-1, -1, size, size), ink, alpha), x, y)


def _bricks(u: _Numbers, x: Tensor, y: Tensor, size: int) -> Tensor:
    hue, _ = _hue(u)
    px, py = _turned(u, x, y, (0.0,))
    tall = u.choice((0.26, 0.32)).view(-1, 1, 1)
    wide, gap = 2.2 * tall, 0.095 * tall
    row = torch.floor(py / tall)
    column = px / wide + 0.5 * (row - 2 * torch.floor(row / 2))
    cell = torch.floor(column)
    dx, dy = ((column - cell - 0.5).abs() - 0.5) * wide + gap, ((py / tall - row - 0.5).abs() - 0.5) * tall + gap
    alpha = cover(torch.maximum(dx, dy), size)
    chance = torch.sin(row * 127.1 + cell * 311.7 + u(0.0, 6.28).view(-1, 1, 1)) * 43.17  # one shade for each brick
    shade = (chance - torch.floor(chance) - 0.5) * 0.16
    brick = flat(_vivid(hue, u(0.12, 0.15), darker=0.05)) * (1 + shade.unsqueeze(1))
    brick = brick * (1 + 0.12 * (-(dy + tall * 0.42) / tall).clamp(-1, 1).unsqueeze(1))
    mortar = flat(draw.oklch(u(0.82, 0.92), u(0.01, 0.04), hue + 0.1))
    return _lamp(u, over(mortar.expand(-1, -1, size, size), brick, alpha), x, y)


_PAINTERS: dict[str, Callable[[_Numbers, Tensor, Tensor, int], Tensor]] = {
    "gradient": _gradient,
    "horizon": _horizon,
    "glow": _glow,
    "dunes": _dunes,
    "disc": _object(draw.disc, 0.0),
    "square": _object(draw.square, 0.25),
    "triangle": _object(draw.triangle, 0.25),
    "star": _object(draw.star, 0.25),
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "bricks": _bricks,
}


def render(
    labels: Sequence[int] | np.ndarray,
    seeds: Sequence[int] | np.ndarray,
    *,
    size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one picture for each (label, seed): `[n, 3, size, size]` float32 RGB in [0, 1].

    The same label and seed give the same picture in any batch; devices differ by rounding only.

    Raises:
        ValueError: lengths differ, or a label is not below `len(CLASSES)`.
    """
    labels = np.asarray(labels, dtype=np.int64)
    seeds = np.asarray(seeds, dtype=np.int64)
    if labels.shape != seeds.shape or labels.ndim != 1:
        raise ValueError(f"labels and seeds must be two lists of one length, found {labels.shape} and {seeds.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise ValueError(f"labels must be 0..{len(CLASSES) - 1}, found {labels.min()}..{labels.max()}")
    x, y = draw.pixels(size, device)
    out = torch.empty(len(labels), 3, size, size, device=device)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        table = torch.from_numpy(draw.uniforms(seeds[where], stream=int(label))).to(device)
        picture = _PAINTERS[CLASSES[label]](_Numbers(table), x, y, size)
        out[torch.from_numpy(where).to(device)] = picture
    return out
