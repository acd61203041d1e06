"""Credit as pure functions of rewards; what the algorithms are made of.

Rewards r are float64[G], those of the attempts of one group.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lightning_ray.algorithms.base import (
    ALGORITHMS,
    FloatArray,
    Group,
    IntArray,
    algorithm_class,
    has_contrast,
)
from lightning_ray.algorithms.config import AlgorithmConfig, OverlongConfig
from lightning_ray.errors import UserError


def above_mean(rewards: FloatArray) -> FloatArray:
    """A_i = r_i - mean(r); exactly zero where all rewards are equal."""
    # Rounding of the mean must not be blown up by a standard deviation of nearly zero.
    return rewards - rewards.mean() if np.ptp(rewards) > 0 else np.zeros(len(rewards))


def leave_one_out(rewards: FloatArray) -> FloatArray:
    """A_i = r_i - mean of the others; of one attempt alone, zero.

    RLOO (Kool et al., 2019; Ahmadian et al., 2024, arXiv:2402.14740, section 2.2).
    """
    size = len(rewards)
    return above_mean(rewards) * (size / (size - 1)) if size > 1 else np.zeros(size)


def over_group_std(advantages: FloatArray, rewards: FloatArray, epsilon: float) -> FloatArray:
    """A_i / (std(r) + epsilon), the population standard deviation."""
    return advantages / (rewards.std() + epsilon)


def over_batch(
    credits: Sequence[FloatArray], lengths: Sequence[IntArray], epsilon: float
) -> list[FloatArray]:
    """(A - mean) / (std + epsilon) over the tokens of a batch: each attempt as often as it is long.

    REINFORCE++ (Hu et al., 2025, arXiv:2501.03262, global advantage normalisation).
    """
    values, counts = np.concatenate(credits), np.concatenate(lengths)
    if np.ptp(values) == 0:
        return [np.zeros(len(credit)) for credit in credits]
    mean = np.average(values, weights=counts)
    std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
    return [(credit - mean) / (std + epsilon) for credit in credits]


def overlong(lengths: IntArray, config: OverlongConfig) -> FloatArray:
    """What attempts lose that come near the longest that is wanted, float64[G], at least 0.

        0                                              length <= max_tokens - buffer
        penalty (length - max_tokens + buffer) / buffer      between
        penalty                                        length >= max_tokens

    Soft overlong punishment, DAPO (Yu et al., 2025, arXiv:2503.14476, equation 13).

    Args:
        lengths: int64[G], sampled tokens of the attempts.
    """
    if config.max_tokens == 0:
        return np.zeros(len(lengths))
    over = lengths - (config.max_tokens - config.buffer)
    share = np.clip(over / max(config.buffer, 1), 0.0, 1.0)
    return config.penalty * np.where(lengths >= config.max_tokens, 1.0, share)


class GroupRelative:
    """An attempt is as good as it did better than the mean of its group."""

    name = "grpo"
    losses: tuple[str, ...] = ("clipped",)
    needs: ClassVar[Mapping[str, Any]] = {}
    """Settings without which it is another algorithm, by their place under `algorithm`."""
    fewest = 2
    """Attempts at a task that can be compared."""

    def __init__(self, config: AlgorithmConfig) -> None:
        """Raises UserError for settings that make another algorithm of it."""
        require(self.name, config, self.losses, self.needs)
        if config.group_size < self.fewest:
            raise UserError(
                f"algorithm.group_size: {config.group_size} attempts cannot be compared with each "
                f"other; use {self.fewest} or more"
            )
        self.loss = config.loss
        self._config = config

    def score_group(self, group: Group) -> FloatArray:
        """One advantage per attempt; exactly zero for a group without contrast."""
        advantages = self.advantages(group.rewards)
        if self._config.normalize == "group" and has_contrast(group):
            advantages = over_group_std(advantages, group.rewards, self._config.std_epsilon)
        return advantages

    def advantages(self, rewards: FloatArray) -> FloatArray:
        """Before they are normalised."""
        return above_mean(rewards)

    def finish_batch(
        self, groups: Sequence[Group], credits: Sequence[FloatArray]
    ) -> list[FloatArray]:
        """Normalised over the batch, where that is asked for."""
        if self._config.normalize != "batch" or not credits:
            return list(credits)
        lengths = [group.lengths for group in groups]
        return over_batch(credits, lengths, self._config.std_epsilon)


def require(
    name: str, config: AlgorithmConfig, losses: Sequence[str], needs: Mapping[str, Any]
) -> None:
    """Refuses settings that an algorithm cannot have.

    Raises:
        UserError: another loss than one of `losses`, or a setting that is not as `needs` says.
    """
    if config.loss.kind not in losses:
        kind = config.loss.kind
        others = [other for other in ALGORITHMS if kind in algorithm_class(other).losses]
        fitting = f", and {kind} with {' or '.join(others)}" if others else ""
        raise UserError(
            f"algorithm.loss.kind={kind}: {name} is used with {' or '.join(losses)}{fitting}; "
            f"algorithm={name} sets it"
        )
    for place, wanted in needs.items():
        value: Any = config
        for part in place.split("."):
            value = getattr(value, part)
        if value != wanted:
            raise UserError(
                f"algorithm.{place}={value}: {name} needs {wanted}; algorithm={name} sets it"
            )
