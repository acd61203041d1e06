"""Means of rewards with an interval that says how far to trust them.

Invariant: NaN stands for an attempt that could not be measured. It is left out, never counted as 0,
and `n` is what remains.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
_RESAMPLES = 10_000
# Of very many values a thousand resamples say as much, and ten thousand take minutes.
_RESAMPLES_OF_MANY = 1_000
_MANY = 20_000
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


def share(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """`successes` of `n` with Wilson's interval; NaN throughout where `n` is 0."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    return _wilson(successes, n, confidence)


def ratio(
    numerators: ArrayLike, denominators: ArrayLike, confidence: float = CONFIDENCE
) -> Interval:
    """sum(numerators) / sum(denominators) over pairs, and its percentile bootstrap over pairs.

    A resample whose denominators sum to 0 counts as infinity, so the upper bound may be infinite.

    Raises:
        ValueError: the two differ in shape, or the denominators sum to 0.
    """
    above = np.asarray(numerators, dtype=np.float64).ravel()
    below = np.asarray(denominators, dtype=np.float64).ravel()
    if above.shape != below.shape or below.sum() == 0:
        raise ValueError(f"no ratio of {above.shape} and {below.shape} that sum to {below.sum()}")
    value = float(above.sum() / below.sum())
    if above.size == 1:
        return Interval(value, -math.inf, math.inf, 1)
    ratios = []
    for drawn in _resamples(above.size):
        sums = below[drawn].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = above[drawn].sum(axis=1) / sums
        ratios.append(np.where(sums == 0, math.inf, found))
    every = np.concatenate(ratios)
    tail = (1 - confidence) / 2
    # Without interpolation: between a number and infinity lies nothing to interpolate.
    low = np.quantile(every, tail, method="lower")
    high = np.quantile(every, 1 - tail, method="higher")
    return Interval(value, min(float(low), value), max(float(high), value), above.size)


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
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in _resamples(n)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    # The mean lies in its own interval, whatever rounding did to the resampled means.
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)


def _resamples(n: int) -> Iterator[NDArray[np.int64]]:
    """Indices of the resamples of `n` values from a fixed seed, in chunks (resamples, n)."""
    generator = np.random.default_rng(0)
    total = _RESAMPLES if n <= _MANY else _RESAMPLES_OF_MANY
    chunk = max(1, _CHUNK // n)
    for start in range(0, total, chunk):
        yield generator.integers(0, n, size=(min(chunk, total - start), n))
