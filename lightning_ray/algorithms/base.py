"""What an algorithm is: credit for the attempts of a group, and the loss in which it is used.

Invariant: nothing here imports torch, so a configuration is checked in milliseconds, before a
cluster or a model exists. An algorithm is a pure function of what it is given: it keeps no state
between groups, and a resumed run scores as the uninterrupted one would have.
"""

import importlib
import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lightning_ray.errors import UserError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ALGORITHMS: dict[str, str] = {"grpo": "lightning_ray.algorithms.grpo:GRPO"}
"""Name in a configuration to "module:class". The class is made with an `AlgorithmConfig`."""

AGGREGATIONS = ("token_mean", "sequence_mean")


@dataclass
class LossConfig:
    """How credit becomes a loss; what the learner needs to know of an algorithm."""

    epsilon_low: float = 0.2
    """The probability ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The probability ratio is clipped above at 1 + epsilon_high."""
    aggregation: str = "token_mean"
    """token_mean: every token of the batch counts the same (a long answer weighs more).
    sequence_mean: every attempt counts the same, and its tokens share its weight."""


@dataclass
class AlgorithmConfig:
    """Which algorithm, and its numbers."""

    name: str = "grpo"
    """One of the names in `ALGORITHMS`."""
    group_size: int = 8
    """Attempts at one task that are compared with each other."""
    normalize_by_std: bool = True
    """Divide the advantages of a group by the standard deviation of its rewards."""
    std_epsilon: float = 1e-6
    """Added to that standard deviation; in the units of the reward."""
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True, eq=False)
class Group:
    """Attempts at one task, as an algorithm sees them; arrays of length G."""

    group_id: str
    rewards: FloatArray
    """float64[G]"""
    lengths: IntArray
    """int64[G]: tokens that can be learnt from, per attempt."""

    def __post_init__(self) -> None:
        if self.rewards.ndim != 1 or self.rewards.shape != self.lengths.shape:
            raise ValueError(
                f"group {self.group_id}: rewards {self.rewards.shape} and lengths "
                f"{self.lengths.shape} must be two vectors of one length"
            )
        if not np.isfinite(self.rewards).all():
            raise ValueError(f"group {self.group_id} has a reward that is not a finite number")


class Algorithm(Protocol):
    """Credit for a group, and the loss it is meant for.

    The conductor calls `score_group` once per group, when every attempt of it has ended and has a
    reward, leaves out the groups without contrast (unless told to keep them), puts the credit on
    the tokens and hands them to the learner together with `loss`. A group may have fewer attempts
    than were asked for (those lost to a fault are left out), never none.
    """

    loss: LossConfig

    def score_group(self, group: Group) -> FloatArray:
        """One advantage per attempt, float64[G]; every token of the attempt gets it."""
        ...


def has_contrast(group: Group) -> bool:
    """Whether some attempts did better than others; without that a group teaches nothing."""
    return bool(np.ptp(group.rewards) > 0.0)


def token_weights(attempts: IntArray, aggregation: str) -> FloatArray:
    """The weight of every trainable token of a batch, so that the weighted sum is the batch loss.

    Args:
        attempts: int64[N], for each trainable token the index of the attempt it belongs to.
        aggregation: see `LossConfig.aggregation`.

    Returns:
        float64[N]; sums to 1 unless N is 0.
    """
    if aggregation == "token_mean":
        return np.full(len(attempts), 1.0 / max(1, len(attempts)))
    if aggregation == "sequence_mean":
        _, index, counts = np.unique(attempts, return_inverse=True, return_counts=True)
        return 1.0 / (len(counts) * counts[index]) if len(attempts) else np.empty(0)
    raise ValueError(f"unknown aggregation {aggregation!r}")


def check_algorithm(config: AlgorithmConfig) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: an unknown name, or a number outside its range.
    """
    if config.name not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise UserError(f"algorithm.name: no algorithm is called {config.name!r}; use {known}")
    if config.group_size < 2:
        raise UserError(
            f"algorithm.group_size: {config.group_size} attempts cannot be compared with each "
            "other; use 2 or more"
        )
    if not (math.isfinite(config.std_epsilon) and config.std_epsilon > 0):
        raise UserError(f"algorithm.std_epsilon: {config.std_epsilon} must be greater than 0")
    check_loss(config.loss)


def check_loss(loss: LossConfig) -> None:
    """Refuse a loss that cannot work.

    Raises:
        UserError: an unknown aggregation, or a clip range outside what a ratio can take.
    """
    if not 0 < loss.epsilon_low <= 1:
        raise UserError(
            f"algorithm.loss.epsilon_low: {loss.epsilon_low} must be greater than 0 and at most 1"
        )
    if not (math.isfinite(loss.epsilon_high) and loss.epsilon_high > 0):
        raise UserError(
            f"algorithm.loss.epsilon_high: {loss.epsilon_high} must be a number greater than 0"
        )
    if loss.aggregation not in AGGREGATIONS:
        raise UserError(
            f"algorithm.loss.aggregation: {loss.aggregation!r} is unknown; use "
            + " or ".join(AGGREGATIONS)
        )


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that a configuration names, checked.

    Raises:
        UserError: see `check_algorithm`.
    """
    check_algorithm(config)
    module, _, name = ALGORITHMS[config.name].partition(":")
    algorithm: Algorithm = getattr(importlib.import_module(module), name)(config)
    return algorithm
