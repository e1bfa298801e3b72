"""Infinity's scale schedules: which token grids (h, w) are generated for an aspect ratio and a resolution.

A *template* is an aspect ratio h/w with 13 grids; a resolution takes the first 7 ("0.06M"), 10 ("0.25M"), 12 ("0.60M")
or 13 ("1M") of them, so a smaller picture is the same schedule, stopped early. One token is 16 x 16 pixels at every
model size: the 8B model's VAE has stride 8, and its tokens are 2 x 2 patches. The grids are those of the original
(FoundationVision/Infinity, infinity/utils/dynamic_resolution.py); a template below 1 is the transpose of one above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toprovar.errors import InputError

__all__ = ["ASPECTS", "RESOLUTIONS", "TOKEN_PIXELS", "Grid", "Schedule", "nearest_aspect", "rope_indices", "schedule"]

Grid = tuple[int, int]

TOKEN_PIXELS = 16
"""Height and width of one token in the picture, in pixels."""

RESOLUTIONS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Resolution (about that many pixels) -> how many scales of the template are run."""

# name -> grids "h w", tall templates only
_TALL: dict[str, str] = {
    "1.0": "1 1, 2 2, 4 4, 6 6, 8 8, 12 12, 16 16, 20 20, 24 24, 32 32, 40 40, 48 48, 64 64",
    "1.25": "1 1, 2 2, 3 3, 5 4, 10 8, 15 12, 20 16, 25 20, 30 24, 35 28, 45 36, 55 44, 70 56",
    "1.333": "1 1, 2 2, 4 3, 8 6, 12 9, 16 12, 20 15, 24 18, 28 21, 36 27, 48 36, 60 45, 72 54",
    "1.5": "1 1, 2 2, 3 2, 6 4, 9 6, 15 10, 21 14, 27 18, 33 22, 39 26, 48 32, 63 42, 78 52",
    "1.75": "1 1, 2 2, 3 3, 7 4, 11 6, 14 8, 21 12, 28 16, 35 20, 42 24, 56 32, 70 40, 84 48",
    "2.0": "1 1, 2 2, 4 2, 6 3, 10 5, 16 8, 22 11, 30 15, 38 19, 46 23, 60 30, 74 37, 90 45",
    "2.5": "1 1, 2 2, 5 2, 10 4, 15 6, 20 8, 25 10, 30 12, 40 16, 50 20, 65 26, 80 32, 100 40",
    "3.0": "1 1, 2 2, 6 2, 9 3, 15 5, 21 7, 27 9, 36 12, 45 15, 54 18, 72 24, 90 30, 111 37",
}
_WIDE: dict[str, str] = {
    "0.8": "1.25", "0.75": "1.333", "0.666": "1.5", "0.571": "1.75", "0.5": "2.0", "0.4": "2.5", "0.333": "3.0",
}  # fmt: skip


def _grids() -> dict[str, tuple[Grid, ...]]:
    tall: dict[str, tuple[Grid, ...]] = {}
    for name, text in _TALL.items():
        pairs = (pair.split() for pair in text.split(","))
        tall[name] = tuple((int(h), int(w)) for h, w in pairs)
    return tall | {name: tuple((w, h) for h, w in tall[other]) for name, other in _WIDE.items()}


ASPECTS: dict[str, tuple[Grid, ...]] = _grids()
"""Template name (h/w as the original writes it) -> its 13 grids (h, w)."""


@dataclass(frozen=True)
class Schedule:
    """The grids of one generation.

    Attributes:
        aspect: name of the template, h/w.
        resolution: "0.06M", "0.25M", "0.60M" or "1M".
        grids: token grids (h, w) of every scale.
        rope_grid: (h, w) onto which RoPE positions are stretched: the last grid of the template's **1M** schedule,
            whatever resolution is generated.
    """

    aspect: str
    resolution: str
    grids: tuple[Grid, ...]
    rope_grid: Grid

    @property
    def image_size(self) -> Grid:
        """(h, w) of the picture in pixels."""
        height, width = self.grids[-1]
        return height * TOKEN_PIXELS, width * TOKEN_PIXELS

    @property
    def tokens(self) -> int:
        """Tokens of all scales together."""
        return sum(height * width for height, width in self.grids)


def nearest_aspect(height_over_width: float) -> str:
    """Name of the template nearest to an aspect ratio (absolute difference of h/w, as the original chooses)."""
    if not height_over_width > 0:
        raise InputError(
            f"aspect ratio {height_over_width}: height / width must be above 0; the templates are {', '.join(ASPECTS)}"
        )
    return min(ASPECTS, key=lambda name: abs(float(name) - height_over_width))


def schedule(aspect: str | float = "1.0", resolution: str = "1M") -> Schedule:
    """The schedule of an aspect ratio (a template's name, or any h/w: the nearest template) and a resolution.

    Raises:
        InputError: an aspect ratio that is no number above 0, or an unknown resolution.
    """
    if resolution not in RESOLUTIONS:
        raise InputError(f"resolution {resolution!r} is not known to Infinity; choose one of {', '.join(RESOLUTIONS)}")
    if isinstance(aspect, str) and aspect not in ASPECTS:
        try:
            aspect = float(aspect)
        except ValueError:
            raise InputError(
                f"aspect ratio {aspect!r} is no number; give height / width, or a template: {', '.join(ASPECTS)}"
            ) from None
    name = aspect if isinstance(aspect, str) else nearest_aspect(aspect)
    full = ASPECTS[name]
    return Schedule(aspect=name, resolution=resolution, grids=full[: RESOLUTIONS[resolution]], rope_grid=full[-1])


def rope_indices(n: int, full: int) -> list[int]:
    """Positions on the `full` grid of the `n` rows (or columns) of a scale: round(i * full / n), half to even.

    The product is taken in float32 as in the original (`rope2d_normalized_by_hw=2`); float64 rounds two entries of the
    released schedules to another row. `i * full / n` falls on an exact half for many pairs, so "to even" matters too.
    """
    if n < 1 or full < 1:
        raise InputError(f"RoPE positions of {n} rows on a grid of {full}: both must be at least 1")
    step = np.float32(full / n)
    return [int(i) for i in np.rint(np.arange(n, dtype=np.float32) * step)]
