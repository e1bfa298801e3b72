"""Pictures of captioned scenes, for the text-conditional demo checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from toprovar.demo import draw
from toprovar.demo.captions import COLOURS, SHAPES, TEXTURES, Scene
from toprovar.demo.draw import cover, flat, mix, over

__all__ = ["fields", "random_scenes", "render_scenes", "scene_of"]

_OKLCH = {  # lightness, chroma, hue in turns
    "red": (0.58, 0.21, 0.075),
    "orange": (0.73, 0.17, 0.165),
    "yellow": (0.89, 0.17, 0.280),
    "green": (0.62, 0.17, 0.400),
    "blue": (0.53, 0.18, 0.725),
    "purple": (0.50, 0.19, 0.850),
    "white": (0.95, 0.005, 0.0),
    "black": (0.24, 0.010, 0.0),
}
_SHAPE_OF: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "disc": draw.disc,
    "square": draw.square,
    "triangle": draw.triangle,
    "star": draw.star,
    "ring": draw.ring,
    "heart": draw.heart,
}
_STREAM = 1000  # keeps the numbers of scenes apart from those of the twelve classes


def fields(scenes: Sequence[Scene]) -> np.ndarray:
    """Return `[n, 6]` int64: count - 1, colour, texture, shape, floor colour, floor texture."""
    rows = [
        (
            s.count - 1,
            COLOURS.index(s.colour),
            TEXTURES.index(s.texture),
            SHAPES.index(s.shape),
            COLOURS.index(s.floor_colour),
            TEXTURES.index(s.floor_texture),
        )
        for s in scenes
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


def scene_of(row: Sequence[int] | np.ndarray) -> Scene:
    """Return the scene of one row of `fields`."""
    count, colour, texture, shape, floor_colour, floor_texture = (int(v) for v in row)
    return Scene(
        count + 1, COLOURS[colour], TEXTURES[texture], SHAPES[shape], COLOURS[floor_colour], TEXTURES[floor_texture]
    )


def random_scenes(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return `[n, 6]` fields drawn evenly, one scene a seed; the floor's colour differs from the things'."""
    u = draw.uniforms(seeds, stream=_STREAM + 1)
    sizes = np.array([4, len(COLOURS), len(TEXTURES), len(SHAPES), len(COLOURS) - 1, len(TEXTURES)])
    rows = (u[:, :6] * sizes).astype(np.int64)
    rows[:, 4] = (rows[:, 1] + 1 + rows[:, 4]) % len(COLOURS)
    return rows


def _inks(index: Tensor, jitter: Tensor, contrast: float, soften: float) -> tuple[Tensor, Tensor]:
    """Return a named colour and the tint its texture is drawn in, each `[n, 3]`."""
    table = torch.tensor([_OKLCH[name] for name in COLOURS], device=index.device)[index]
    light = table[:, 0] + mix(-0.015, 0.015, jitter[:, 0])
    chroma = table[:, 1] * soften
    hue = table[:, 2] + mix(-0.010, 0.010, jitter[:, 1])
    step = torch.where(light > 0.70, -contrast, contrast)
    return draw.oklch(light, chroma, hue), draw.oklch(light + step, chroma * 0.8, hue)


def _pattern(kind: Tensor, x: Tensor, y: Tensor, period: Tensor, size: int) -> Tensor:
    """Return the coverage `[n, h, w]` of the texture each picture names: plain, striped, dotted or checkered."""
    k = kind.view(-1, 1, 1)
    distance = torch.where(
        k == 1,
        draw.stripe(x, period, 0.42),
        torch.where(k == 2, draw.dots(x, y, period, 0.28), draw.checker(x, y, period * 0.5)),
    )
    return torch.where(k == 0, torch.zeros_like(distance), cover(distance, size))


def render_scenes(
    rows: np.ndarray,
    seeds: Sequence[int] | np.ndarray,
    *,
    size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one picture for each row of `fields` and seed: `[n, 3, size, size]` float32 RGB in [0, 1].

    Raises:
        ValueError: lengths differ.
    """
    rows, seeds = np.asarray(rows, dtype=np.int64), np.asarray(seeds, dtype=np.int64)
    if rows.shape != (len(seeds), 6):
        raise ValueError(f"rows must be [{len(seeds)}, 6] for {len(seeds)} seeds, found {list(rows.shape)}")
    x, y = draw.pixels(size, device)
    out = torch.empty(len(seeds), 3, size, size, device=device)
    numbers = draw.uniforms(seeds, stream=_STREAM)
    for shape in np.unique(rows[:, 3]):
        where = np.flatnonzero(rows[:, 3] == shape)
        table, row = torch.from_numpy(numbers[where]).to(device), torch.from_numpy(rows[where]).to(device)
        picture = _paint(_SHAPE_OF[SHAPES[shape]], row, table, x, y, size)
        out[torch.from_numpy(where).to(device)] = picture
    return out


_FIRST_ANGLE = (0.0, 0.0, -math.pi / 2, math.pi / 4)  # of the things around their middle, by count: side by side,
_ORBIT = (0.0, 0.46, 0.52, 0.64)  # a triangle, a square
_RADIUS = ((0.44, 0.56), (0.33, 0.37), (0.31, 0.34), (0.30, 0.33))


def _paint(
    shape: Callable[[Tensor, Tensor, Tensor], Tensor], row: Tensor, u: Tensor, x: Tensor, y: Tensor, size: int
) -> Tensor:
    """Draw one shape's pictures. Layouts vary little: what a caption leaves open is what a small model gets wrong."""

    def by_count(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=u.device)[count]

    zero = torch.zeros(len(row), device=u.device)
    count = row[:, 0]
    # The floor: one colour with its texture in a near tint, lit from the upper left.
    px, py = draw.place(x, y, mix(-0.05, 0.05, u[:, 0]), mix(-0.05, 0.05, u[:, 1]), mix(-0.06, 0.06, u[:, 2]) + 0.3)
    ground, tint = _inks(row[:, 4], u[:, 3:5], 0.13, 0.85)
    picture = over(
        flat(ground).expand(-1, -1, size, size), flat(tint), _pattern(row[:, 5], px, py, mix(0.38, 0.42, u[:, 5]), size)
    )
    slope, _ = draw.place(x, y, zero, zero, math.pi / 4 + mix(-0.4, 0.4, u[:, 6]))
    picture = picture * (1.0 - 0.06 * slope.unsqueeze(1))
    # The things: one in the middle, or two to four on a circle that is turned and nudged.
    orbit, low, high = by_count(_ORBIT), by_count([r[0] for r in _RADIUS]), by_count([r[1] for r in _RADIUS])
    radius = low + (high - low) * u[:, 7]
    free = (0.96 - orbit - 1.15 * radius).clamp(0.02, 0.22)
    cx, cy = mix(-1.0, 1.0, u[:, 8]) * free, mix(-1.0, 1.0, u[:, 9]) * free
    turn, lean = by_count(_FIRST_ANGLE) + mix(-0.2, 0.2, u[:, 10]), mix(-0.2, 0.2, u[:, 11])
    colour, stroke = _inks(row[:, 1], u[:, 12:14], 0.26, 1.0)
    period = radius * torch.where(count == 0, 0.60, 0.88)
    nearest = shadow = torch.full((len(row), size, size), 9.0, device=u.device)
    along, across = nearest, nearest  # coordinates of the nearest thing's texture
    for k in range(int(count.max()) + 1):
        there = (count >= k).view(-1, 1, 1)
        angle = turn + 2 * math.pi * k / (count + 1)
        ox = cx + orbit * torch.cos(angle) + 0.02 * mix(-1.0, 1.0, u[:, 16 + 3 * k])
        oy = cy + orbit * torch.sin(angle) + 0.02 * mix(-1.0, 1.0, u[:, 17 + 3 * k])
        tilt = lean + mix(-0.06, 0.06, u[:, 18 + 3 * k])
        distance = torch.where(there, shape(*draw.place(x, y, ox, oy, tilt), radius), 9.0)
        below = shape(*draw.place(x, y, ox + 0.10 * radius, oy + 0.15 * radius, tilt), radius)
        qx, qy = draw.place(x, y, ox, oy, tilt + 0.6)
        closer = distance < nearest
        along, across = torch.where(closer, qx, along), torch.where(closer, qy, across)
        nearest = torch.minimum(nearest, distance)
        shadow = torch.minimum(shadow, torch.where(there, below, 9.0))
    body = over(flat(colour).expand(-1, -1, size, size), flat(stroke), _pattern(row[:, 2], along, across, period, size))
    picture = picture * (1 - 0.42 * cover(shadow, size, blur=0.16).unsqueeze(1))
    edge = cover(-(nearest + 0.028), size, blur=0.02)
    return over(picture, over(body, body * 0.6, edge), cover(nearest, size)).clamp(0, 1)
