"""Constants published for the grids of Infinity-2B, carried over to another schedule.

The rule, for every rival alike: a grid's *place* is its side over the side of the last grid, a layer's place its index
over the depth. A scale takes the setting published for the grid of the nearest place (nearest by ratio), a range of layers
keeps its share. The late grids of the text demo are Infinity's at half size, so there every published setting has an exact
counterpart; the class demo has none for 40 x 40.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["INFINITY_GRIDS", "nearest_published", "place", "share_of_depth"]

INFINITY_GRIDS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
"""Sides of the 1:1 schedule of 1M pixels, which all published constants are for."""


def _side(grid: tuple[int, int]) -> float:
    return math.sqrt(grid[0] * grid[1])


def place(grids: Sequence[tuple[int, int]], scale: int) -> float:
    """Side of a scale's grid over the last one's."""
    return _side(grids[scale]) / _side(grids[-1])


def nearest_published(grids: Sequence[tuple[int, int]], scale: int) -> int:
    """Side of the published grid that a scale takes its settings from; of two equally near, the larger."""
    here = math.log(place(grids, scale))
    last = INFINITY_GRIDS[-1]
    return min(INFINITY_GRIDS, key=lambda side: (round(abs(math.log(side / last) - here), 9), -side))


def share_of_depth(depth: int, layer: int, of: int) -> int:
    """Layer `layer` of a model of `of` layers, in one of `depth`."""
    return round(layer * depth / of)
