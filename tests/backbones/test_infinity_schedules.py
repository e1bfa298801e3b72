"""Schedules against the facts of the original (its dynamic_resolution.py and RoPE index tables)."""

from __future__ import annotations

import numpy as np
import pytest

from toprovar.backbones.schedules import ASPECTS, RESOLUTIONS, nearest_aspect, rope_indices, schedule
from toprovar.errors import InputError

# template -> tokens of the 0.06M, 0.25M, 0.60M and 1M schedules, and the picture of the 1M one, height x width
FACTS = {
    "1.0": (521, 2521, 6425, 10521, (1024, 1024)),
    "1.25": (614, 2814, 6854, 10774, (1120, 896)),
    "1.333": (665, 2657, 7085, 10973, (1152, 864)),
    "1.5": (533, 2759, 6941, 10997, (1248, 832)),
    "1.75": (472, 2628, 7220, 11252, (1344, 768)),
    "2.0": (451, 2681, 7219, 11269, (1440, 720)),
    "2.5": (555, 2555, 6805, 10805, (1600, 640)),
    "3.0": (509, 2588, 7016, 11123, (1776, 592)),
}
WIDE = {"0.8": "1.25", "0.75": "1.333", "0.666": "1.5", "0.571": "1.75", "0.5": "2.0", "0.4": "2.5", "0.333": "3.0"}


@pytest.mark.parametrize("name", [*FACTS, *WIDE])
def test_templates(name: str) -> None:
    tall = WIDE.get(name, name)
    *tokens, (height, width) = FACTS[tall]
    schedules = [schedule(name, resolution) for resolution in RESOLUTIONS]
    assert [s.tokens for s in schedules] == tokens
    assert [len(s.grids) for s in schedules] == [7, 10, 12, 13]
    assert schedules[-1].image_size == ((width, height) if name in WIDE else (height, width))
    assert {s.rope_grid for s in schedules} == {schedules[-1].grids[-1]}
    assert all(s.grids == schedules[-1].grids[: len(s.grids)] for s in schedules)
    assert schedules[0].grids[0] == (1, 1)
    if name in WIDE:
        assert schedules[-1].grids == tuple((w, h) for h, w in schedule(tall).grids)


def test_there_are_fifteen_templates_and_the_nearest_is_taken() -> None:
    assert len(ASPECTS) == 15 == len(FACTS) + len(WIDE)
    assert nearest_aspect(1.0) == "1.0" and nearest_aspect(9.0) == "3.0" and nearest_aspect(0.01) == "0.333"
    assert nearest_aspect(16 / 9) == "1.75" and nearest_aspect(9 / 16) == "0.571"
    assert schedule("1.3").aspect == "1.333" == schedule(1.3).aspect


def test_rope_positions_are_rounded_half_to_even_in_float32() -> None:
    assert rope_indices(4, 64) == [0, 16, 32, 48]
    assert rope_indices(6, 64) == [0, 11, 21, 32, 43, 53]
    # 54 / 12 = 4.5 and 72 / 16 = 4.5: odd multiples fall on a half.
    assert rope_indices(12, 54) == [0, 4, 9, 14, 18, 22, 27, 32, 36, 40, 45, 50]
    assert rope_indices(16, 72)[:6] == [0, 4, 9, 14, 18, 22]


def test_float64_would_round_two_entries_differently() -> None:
    pairs = {(n, full) for grids in ASPECTS.values() for grid in grids for n, full in zip(grid, grids[-1], strict=True)}
    different = sum(rope_indices(n, full) != [int(i) for i in np.rint(np.arange(n) * (full / n))] for n, full in pairs)
    assert different > 0
    ties = sum(bool(np.any((np.arange(n) * (full / n)) % 1 == 0.5)) for n, full in pairs)
    assert ties >= 31


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: schedule("1.0", "2M"),
            "resolution '2M' is not known to Infinity; choose one of 0.06M, 0.25M, 0.60M, 1M",
        ),
        (lambda: schedule("square"), "aspect ratio 'square' is no number"),
        (lambda: schedule(-1.0), "height / width must be above 0"),
        (lambda: schedule(float("nan")), "height / width must be above 0"),
        (lambda: rope_indices(0, 4), "both must be at least 1"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
