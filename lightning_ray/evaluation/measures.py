"""Means of rewards with an interval that says how far to trust them.

Invariant: NaN stands for an attempt that could not be measured. It is left out, never counted as 0,
and `n` is what remains.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_CHUNK = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; NaN throughout where there was nothing to measure."""

    mean: float
    low: float
    high: float
    n: int
    """Measurements behind it."""


def completion_quality(rewards: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The mean of `rewards` (any shape, NaN for an unmeasured attempt) and its interval.

    Where every reward is 0 or 1: Wilson's score interval (E. B. Wilson, "Probable inference, the
    law of succession, and statistical inference", 1927), which holds near 0 and 1 and for few
    samples. Otherwise: the percentile bootstrap (B. Efron, 1979) with 10,000 resamples from a
    fixed seed; a single value tells nothing of the spread, so its interval is unbounded.
    """
    values = _measured(rewards)
    if values.size and np.isin(values, (0.0, 1.0)).all():
        return _wilson(int(values.sum()), values.size, confidence)
    return _bootstrap(values, confidence)


def paired_difference(
    before: ArrayLike, after: ArrayLike, confidence: float = CONFIDENCE
) -> Interval:
    """The mean of `after - before` over the same tasks in the same order, and its interval.

    Pairs of which either half is NaN are left out. The interval is the percentile bootstrap over
    pairs: a task's own difficulty cancels.

    Raises:
        ValueError: the two differ in shape, so their tasks cannot be paired.
    """
    first = np.asarray(before, dtype=np.float64)
    second = np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"rewards before {first.shape} and after {second.shape} are not of pairs")
    return _bootstrap(_measured(second - first), confidence)


def _measured(values: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat[~np.isnan(flat)]


def _wilson(successes: int, n: int, confidence: float) -> Interval:
    """(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z the normal quantile."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n successes the formula gives 0 and 1 exactly; rounding may miss them by an ulp.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return Interval(p, low, high, n)


def _bootstrap(values: NDArray[np.float64], confidence: float) -> Interval:
    n = values.size
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    generator = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    chunk = max(1, _CHUNK // n)
    for start in range(0, _RESAMPLES, chunk):
        count = min(chunk, _RESAMPLES - start)
        drawn = generator.integers(0, n, size=(count, n))
        means[start : start + count] = values[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    # The mean lies in its own interval, whatever rounding did to the resampled means.
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)
