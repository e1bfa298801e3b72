"""Intervals hold the mean, cover the truth about as often as they say, and decide nothing by their seed."""

import numpy as np
import pytest

from toprovar.errors import InputError
from toprovar.profiles.statistics import bootstrap, exact_mean


def test_the_mean_depends_neither_on_seed_nor_on_order():
    values = np.random.default_rng(0).normal(3, 1, 200)
    first = bootstrap(values)
    assert first == bootstrap(values)
    other = bootstrap(values, seed=9)
    assert other.mean == first.mean and other.low != first.low
    shuffled = np.random.default_rng(1).permutation(values)
    assert exact_mean(shuffled) == exact_mean(values) == first.mean
    assert first.low < first.mean < first.high


def test_intervals_cover_the_truth():
    random = np.random.default_rng(2)
    intervals = [bootstrap(random.normal(1, 2, 60), draws=400) for _ in range(200)]
    covered = np.mean([one.low <= 1 <= one.high for one in intervals])
    assert 0.88 <= covered <= 0.99


def test_a_statistic_of_rows_keeps_pairs_together():
    random = np.random.default_rng(3)
    first = random.normal(0, 10, 50)
    rows = np.stack([first, first + 1], axis=1)
    difference = bootstrap(rows, lambda r: float((r[:, 1] - r[:, 0]).mean()))
    assert difference.low == pytest.approx(1) and difference.high == pytest.approx(1)


def test_what_cannot_be_resampled_is_refused():
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(InputError, match="bootstrap"):
            bootstrap(values)
    with pytest.raises(InputError, match="give a statistic"):
        bootstrap(np.ones((3, 2)))
