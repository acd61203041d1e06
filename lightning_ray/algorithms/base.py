"""What an algorithm is: credit for the attempts of a group, and the loss in which it is used.

Invariant: nothing here imports torch, so a configuration is checked in milliseconds, before a
cluster or a model exists. An algorithm is a pure function of what it is given: it keeps no state
between groups, and a resumed run scores as the uninterrupted one would have.
"""

import importlib
import math
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from lightning_ray.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ALGORITHMS: dict[str, str] = {"grpo": "lightning_ray.algorithms.grpo:GRPO"}
"""Name in a configuration to "module:class". The class is made with an `AlgorithmConfig`."""

AGGREGATIONS = ("token_mean", "sequence_mean")
LOSSES = ("clipped", "cross_entropy")


@dataclass
class LossConfig:
    """How credit becomes a loss; what the learner needs to know of an algorithm."""

    kind: str = "clipped"
    """clipped: the surrogate of PPO, with credit of either sign.
    cross_entropy: minus the mean logprob of the tokens; credit is their weight, 0 or above.
    `losses` has the formulas."""
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
    """One of the names in `ALGORITHMS`, or `module:Class`, a class of your own."""
    group_size: int = 8
    """Attempts at one task that are compared with each other."""
    normalize_by_std: bool = True
    """Divide the advantages of a group by the standard deviation of its rewards."""
    std_epsilon: float = 1e-6
    """Added to that standard deviation; in the units of the reward."""
    loss: LossConfig = field(default_factory=LossConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an algorithm of your own; the others have none."""


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
    """Credit for a group, and the loss it is meant for; made with an `AlgorithmConfig`.

    `score_group` is called once per group, when every attempt of it has ended and has a reward;
    groups without contrast are left out before, unless the checks of the data are told to keep
    them. The credit is put on the tokens, and the learner takes a step on them with `loss`. A group
    may have fewer attempts than were asked for (those lost to a fault are left out), never none.
    One whose credit is zero throughout teaches nothing: it is left out and counted.
    """

    loss: LossConfig

    def score_group(self, group: Group) -> FloatArray:
        """The credit of each attempt, finite, float64[G]; every token of the attempt gets it."""
        ...


class TokenLoss(Protocol):
    """A loss of one's own, token by token; a pure function of tensors."""

    def __call__(
        self, logprobs: "Tensor", old_logprobs: "Tensor", advantages: "Tensor"
    ) -> "Tensor":
        """The loss of each token, float32[N]; a step minimises its weighted mean over the batch.

        A token's loss may depend on its own entries alone: the learner computes a batch in parts,
        over rows and ranks, and what it adds up must not depend on where they were cut. N may be 0.

        Args:
            logprobs: float32[N], natural logarithms under the policy that is trained; the gradient
                flows through these.
            old_logprobs: float32[N], as recorded when the tokens were sampled.
            advantages: float32[N], the credit that `score_group` gave.
        """
        ...


class OwnLossAlgorithm(Algorithm, Protocol):
    """An algorithm with a loss of its own; of `loss` only the aggregation counts then."""

    token_loss: TokenLoss


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
    """Refuse what cannot work; an algorithm of the user's own is imported and tried out.

    Raises:
        UserError: an unknown name, a number outside its range, or see `custom.try_out`.
    """
    make_algorithm(config)


def check_loss(loss: LossConfig) -> None:
    """Refuse a loss that cannot work.

    Raises:
        UserError: an unknown kind or aggregation, or a clip range outside what a ratio can take.
    """
    if loss.kind not in LOSSES:
        raise UserError(
            f"algorithm.loss.kind: {loss.kind!r} is unknown; use " + " or ".join(LOSSES)
        )
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
    if config.group_size < 2:
        raise UserError(
            f"algorithm.group_size: {config.group_size} attempts cannot be compared with each "
            "other; use 2 or more"
        )
    if not (math.isfinite(config.std_epsilon) and config.std_epsilon > 0):
        raise UserError(f"algorithm.std_epsilon: {config.std_epsilon} must be greater than 0")
    check_loss(config.loss)
    if ":" in config.name:
        from lightning_ray.algorithms.custom import load_algorithm

        return load_algorithm(config)
    if config.name not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise UserError(
            f"algorithm.name: no algorithm is called {config.name!r}; use {known}, or "
            "module:Class for one of your own"
        )
    if config.options:
        raise UserError(
            f"algorithm.options: {config.name} has no {', '.join(map(repr, config.options))}; "
            "they are for an algorithm of your own, algorithm.name=module:Class"
        )
    module, _, name = ALGORITHMS[config.name].partition(":")
    algorithm: Algorithm = getattr(importlib.import_module(module), name)(config)
    return algorithm


def score(algorithm: Algorithm, name: str, group: Group) -> FloatArray:
    """What `score_group` gives, checked; `name` is what the configuration calls the algorithm.

    Raises:
        UserError: it raised, or did not give one finite number per attempt.
    """
    try:
        with np.errstate(all="ignore"):  # what is not finite is told below
            credit = np.asarray(algorithm.score_group(group), np.float64)
    except Exception as error:
        raise UserError(
            f"algorithm.name={name}: score_group raised {describe(error)} on a group with the "
            f"rewards {group.rewards.tolist()}"
        ) from error
    if credit.shape != group.rewards.shape:
        raise UserError(
            f"algorithm.name={name}: score_group gave an array of shape {credit.shape} for a group "
            f"of {len(group.rewards)} attempts; give one number per attempt"
        )
    if not np.isfinite(credit).all():
        raise UserError(
            f"algorithm.name={name}: score_group gave {credit.tolist()} for the rewards "
            f"{group.rewards.tolist()}; give finite numbers"
        )
    own = own_loss(algorithm) is not None
    if not own and algorithm.loss.kind == "cross_entropy" and (credit < 0).any():
        raise UserError(
            f"algorithm.name={name}: score_group gave {credit.tolist()}; under "
            "algorithm.loss.kind=cross_entropy credit is a weight, so 0 or above"
        )
    return credit


def own_loss(algorithm: Algorithm) -> TokenLoss | None:
    """The algorithm's own loss; None where it uses the one that `loss` names."""
    loss: TokenLoss | None = getattr(algorithm, "token_loss", None)
    return loss


def describe(error: BaseException) -> str:
    """An exception of the user's code with the last place in it that it came through."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    here = str(Path(__file__).parent)
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((here, "<frozen importlib"))
    ]
    outside = [frame for frame in outside if not frame.filename.endswith("importlib/__init__.py")]
    where = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {error}{where}"
