"""Bootstrap intervals over pictures: percentiles of resampled means, or of any statistic of resampled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from toprovar.errors import InputError
from toprovar.profiles.evidence import Interval

__all__ = ["DRAWS", "bootstrap", "exact_mean"]

DRAWS = 2000
"""Resamples of an interval."""

Array = npt.NDArray[np.float64]


def exact_mean(values: Sequence[float] | Array) -> float:
    """The mean, correctly rounded: the order of the values does not count."""
    return math.fsum(float(value) for value in values) / len(values)


def bootstrap(
    values: npt.ArrayLike,
    statistic: Callable[[Array], float] | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """A statistic of pictures and its 95% interval.

    Args:
        values: `[n]`, or `[n, f]` rows of figures, one row a picture. Two sets that are compared picture by picture go in
            as columns, so that they are resampled together.
        statistic: of `[n]` or `[n, f]`; the mean by default.
        seed: of the resampling. It moves the interval's ends a little and the mean not at all; nothing is decided by it.
        draws: resamples.

    Raises:
        InputError: no value, or one that is not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    if not len(rows) or not np.isfinite(rows).all():
        raise InputError(f"bootstrap: found {len(rows)} values, not all finite; expected at least one finite value")
    generator = np.random.Generator(np.random.PCG64(seed))
    indices = generator.integers(0, len(rows), size=(draws, len(rows)))
    if statistic is None:
        if rows.ndim != 1:
            raise InputError(f"bootstrap: found rows of shape {rows.shape}; give a statistic for more than one column")
        center, resampled = exact_mean(rows), rows[indices].mean(1)
    else:
        center = float(statistic(rows))
        resampled = np.array([statistic(rows[chosen]) for chosen in indices])
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(mean=center, low=float(min(low, high)), high=float(max(low, high)))
