"""Two sets of rollouts on the same tasks, compared task by task."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_ray.evaluation.measures import Interval, paired_difference
from lightning_ray.evaluation.outcomes import Outcome

_EXACT_UP_TO = 16
_FLIPS = 20_000
_CHUNK = 1_000_000


@dataclass(frozen=True)
class TaskPair:
    """A task that both sets have; rewards are means over its samples."""

    task_id: str
    task: str
    reward: float
    against: float

    @property
    def difference(self) -> float:
        """Above 0 where the subject is better."""
        return self.reward - self.against


@dataclass(frozen=True)
class Comparison:
    """How much better the subject is than what it is compared against."""

    reward: str
    """The reward's name."""
    pairs: tuple[TaskPair, ...]
    difference: Interval
    """Mean over tasks of subject - against."""
    p_value: float
    """Of the sign-flip test that the two are equally good, two-sided."""
    wins: int
    ties: int
    losses: int
    unpaired: int
    """Tasks with a measured reward on one side only."""


def compare(
    outcomes: Sequence[Outcome], against: Sequence[Outcome], reward: str
) -> Comparison | None:
    """Pairs the two by task, id and content, and compares each task's mean reward.

    Rollouts without the reward or without a task id count nowhere. None where no task is in both.
    """
    first, second = _task_means(outcomes, reward), _task_means(against, reward)
    shared = [key for key in first if key in second]
    if not shared:
        return None
    pairs = tuple(TaskPair(*key, reward=first[key], against=second[key]) for key in shared)
    differences = np.array([pair.difference for pair in pairs])
    signs = np.sign(np.where(np.abs(differences) < 1e-12, 0.0, differences))
    return Comparison(
        reward=reward,
        pairs=pairs,
        difference=paired_difference([second[k] for k in shared], [first[k] for k in shared]),
        p_value=sign_flip_test(differences),
        wins=int((signs > 0).sum()),
        ties=int((signs == 0).sum()),
        losses=int((signs < 0).sum()),
        unpaired=len(set(first) ^ set(second)),
    )


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p-value of the mean of paired differences (R. A. Fisher, 1935).

    Were the two sides alike, each difference could as well have the other sign: the p-value is the
    share of sign patterns with a sum at least as far from 0. All patterns of up to 16 differences
    that are not 0; beyond, 20,000 from a fixed seed, the observed one among them.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.abs(values) > 1e-12]
    if values.size == 0:
        return 1.0
    # Sums that differ by rounding only are equally far.
    observed = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if values.size <= _EXACT_UP_TO:
        bits = np.arange(2**values.size)[:, None] >> np.arange(values.size) & 1
        return float((np.abs(_flipped(values, bits)) >= observed).mean())
    generator = np.random.default_rng(0)
    chunk = max(1, _CHUNK // values.size)
    far = 1
    for start in range(0, _FLIPS, chunk):
        count = min(chunk, _FLIPS - start)
        bits = generator.integers(0, 2, size=(count, values.size))
        far += int((np.abs(_flipped(values, bits)) >= observed).sum())
    return far / (_FLIPS + 1)


def _flipped(values: NDArray[np.float64], bits: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of `values` (n) under each row of `bits` (rows, n), where 1 flips a sign."""
    return values.sum() - 2 * (bits @ values)


def _task_means(outcomes: Sequence[Outcome], reward: str) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        if outcome.task_id is not None and reward in outcome.rewards:
            key = (outcome.task_id, outcome.task)
            values.setdefault(key, []).append(outcome.rewards[reward])
    return {key: float(np.mean(found)) for key, found in values.items()}
