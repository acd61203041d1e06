"""Which algorithm, and its numbers (Hydra group `algorithm`), with what of them cannot work.

Invariant: nothing here imports torch, so a configuration is checked in milliseconds, before a
cluster or a model exists.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.errors import UserError

AGGREGATIONS = ("token_mean", "sequence_mean", "group_mean", "fixed_length")
LOSSES = ("clipped", "sequence_clipped", "clipped_weight", "policy_gradient", "cross_entropy")
CORRECTIONS = (
    "none",
    "token_truncate",
    "token_mask",
    "icepop",
    "sequence_truncate",
    "sequence_mask",
)
OLD = ("recorded", "current")
ESTIMATORS = ("k1", "k2", "k3")
PLACES = ("loss", "reward")
NORMALIZATIONS = ("none", "group", "batch")

# Their loss has a probability ratio in it, which is itself a correction for old tokens.
_WITH_RATIO = ("clipped", "sequence_clipped", "clipped_weight")
_TRUNCATING = ("token_truncate", "sequence_truncate")


@dataclass
class KlConfig:
    """Staying near a reference: the weights that the run began with."""

    coefficient: float = 0.0
    """How much a nat of divergence costs; 0 keeps no reference, which takes the room of a model."""
    estimator: str = "k3"
    """k1, k2 or k3 (Schulman, 2020); `divergence` has the formulas."""
    place: str = "loss"
    """loss: added to the loss, with its gradient.
    reward: taken from the credit of a token and of those before it in its sequence."""
    whiten: bool = False
    """Where it lies in the reward: credit is brought to mean 0 and deviation 1 over the batch after
    it was taken away, by the learner; a forward pass more."""

    @property
    def in_reward(self) -> bool:
        """Whether it costs something, and that is taken from the credit."""
        return self.coefficient > 0 and self.place == "reward"


@dataclass
class CorrectionConfig:
    """What is done about tokens that another policy sampled than the one that learns."""

    kind: str = "none"
    """token_truncate, token_mask, icepop: by each token's ratio of learner to engine.
    sequence_truncate, sequence_mask: by the product of the ratios of a sequence's sampled tokens.
    `off_policy` has the formulas."""
    low: float = 0.5
    """The least ratio that icepop keeps."""
    high: float = 2.0
    """The greatest ratio that is kept, or to which it is cut."""


@dataclass
class CriticConfig:
    """A value of every token, learnt beside the policy, in place of a group as the baseline."""

    coefficient: float = 0.0
    """How much the values' squared error counts beside the policy's loss; 0 is no critic."""
    discount: float = 1.0
    """Of rewards, for each token (gamma)."""
    trace: float = 0.95
    """How far an advantage looks ahead (lambda): 0 one token, 1 to the end."""
    whiten: bool = True
    """Advantages are brought to mean 0 and deviation 1 over the batch: a forward pass more."""
    rate: float = 10.0
    """The values' learning rate, times that of the policy."""


@dataclass
class LossConfig:
    """How credit becomes a loss; what the learner needs to know of an algorithm."""

    kind: str = "clipped"
    """clipped: the surrogate of PPO, with credit of either sign.
    sequence_clipped: the same with one ratio for a whole sequence (GSPO).
    clipped_weight: the ratio is clipped but every token keeps its gradient (CISPO).
    policy_gradient: credit times logprob (REINFORCE).
    cross_entropy: minus the mean logprob of the tokens; credit is their weight, 0 or above.
    `losses` has the formulas."""
    epsilon_low: float = 0.2
    """The probability ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The probability ratio is clipped above at 1 + epsilon_high."""
    aggregation: str = "token_mean"
    """token_mean: every token of the batch counts the same (a long answer weighs more).
    sequence_mean: every attempt counts the same, and its tokens share its weight.
    group_mean: every group counts the same, and the tokens of its attempts share its weight.
    fixed_length: the sum over an attempt's tokens over `fixed_length`, a mean over attempts."""
    fixed_length: int = 0
    """Tokens that a sum is divided by under aggregation=fixed_length: the longest answer."""
    old: str = "recorded"
    """What the ratio is over. recorded: the logprobs that the engine recorded.
    current: the learner's own at the beginning of the step (decoupled PPO); how far these are from
    the recorded ones is what `correction` corrects."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    entropy_coefficient: float = 0.0
    """How much a nat of the policy's entropy is worth, taken from the loss."""


@dataclass
class OverlongConfig:
    """A penalty for answers that come near the longest that is wanted."""

    max_tokens: int = 0
    """Sampled tokens of an attempt from which on the penalty is full; 0 for no penalty."""
    buffer: int = 0
    """Over so many tokens before that it grows from 0."""
    penalty: float = 1.0
    """The full penalty, in units of the reward."""


@dataclass
class AlgorithmConfig:
    """Which algorithm, and its numbers."""

    name: str = "grpo"
    """One of the names in `ALGORITHMS`, or `module:Class`, a class of your own."""
    group_size: int = 8
    """Attempts at one task that are compared with each other."""
    min_group: int = 1
    """A group of which fewer came to a reward is left out, and counted."""
    normalize: str = "group"
    """Advantages are divided by the standard deviation of their group's rewards (group), of all
    advantages of the batch (batch: after their mean is taken away), or not at all (none)."""
    std_epsilon: float = 1e-6
    """Added to that standard deviation; in the units of the reward."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    extra_rounds: int = 0
    """Dynamic sampling: where groups have no contrast, other tasks are tried in their place, at
    most so many times a step."""
    loss: LossConfig = field(default_factory=LossConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an algorithm of your own; the others have none."""


def check_numbers(config: AlgorithmConfig) -> None:
    """Refuses what no algorithm can work with. Raises UserError."""
    if config.group_size < 1:
        raise UserError(f"algorithm.group_size: {config.group_size} must be at least 1")
    if not 1 <= config.min_group <= config.group_size:
        raise UserError(
            f"algorithm.min_group: {config.min_group} must be at least 1 and at most "
            f"algorithm.group_size, {config.group_size}"
        )
    _one_of("normalize", config.normalize, NORMALIZATIONS)
    _positive("std_epsilon", config.std_epsilon)
    if config.extra_rounds < 0:
        raise UserError(f"algorithm.extra_rounds: {config.extra_rounds} must be 0 or more")
    overlong = config.overlong
    if overlong.max_tokens < 0 or not 0 <= overlong.buffer <= overlong.max_tokens:
        raise UserError(
            f"algorithm.overlong: buffer={overlong.buffer} must lie between 0 and "
            f"max_tokens={overlong.max_tokens}"
        )
    if not (math.isfinite(overlong.penalty) and overlong.penalty >= 0):
        raise UserError(f"algorithm.overlong.penalty: {overlong.penalty} must be 0 or more")
    check_loss(config.loss)


def check_loss(loss: LossConfig) -> None:
    """Refuses a loss that cannot work.

    Raises:
        UserError: an unknown name, a number outside its range, or two settings that do the same.
    """
    _one_of("loss.kind", loss.kind, LOSSES)
    _one_of("loss.aggregation", loss.aggregation, AGGREGATIONS)
    _one_of("loss.old", loss.old, OLD)
    _one_of("loss.correction.kind", loss.correction.kind, CORRECTIONS)
    _one_of("loss.kl.estimator", loss.kl.estimator, ESTIMATORS)
    _one_of("loss.kl.place", loss.kl.place, PLACES)
    if not 0 < loss.epsilon_low <= 1:
        raise UserError(
            f"algorithm.loss.epsilon_low: {loss.epsilon_low} must be greater than 0 and at most 1"
        )
    _positive("loss.epsilon_high", loss.epsilon_high)
    if (loss.fixed_length > 0) != (loss.aggregation == "fixed_length") or loss.fixed_length < 0:
        raise UserError(
            f"algorithm.loss.fixed_length: {loss.fixed_length} with "
            f"algorithm.loss.aggregation={loss.aggregation}; fixed_length needs a number of "
            "tokens, and the others have none"
        )
    for name, value in (
        ("kl.coefficient", loss.kl.coefficient),
        ("entropy_coefficient", loss.entropy_coefficient),
        ("critic.coefficient", loss.critic.coefficient),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"algorithm.loss.{name}: {value} must be 0 or more")
    for name, value in (("discount", loss.critic.discount), ("trace", loss.critic.trace)):
        if not 0 <= value <= 1:
            raise UserError(f"algorithm.loss.critic.{name}: {value} must lie between 0 and 1")
    _positive("loss.critic.rate", loss.critic.rate)
    _check_correction(loss)


def _check_correction(loss: LossConfig) -> None:
    correction = loss.correction
    if not (0 <= correction.low < correction.high and math.isfinite(correction.high)):
        raise UserError(
            f"algorithm.loss.correction: low={correction.low} must be at least 0 and less than "
            f"high={correction.high}"
        )
    beside = correction.kind != "none" or loss.kl.coefficient or loss.critic.coefficient
    if loss.kind == "cross_entropy" and beside:
        raise UserError(
            "algorithm.loss.kind=cross_entropy learns tokens whoever sampled them: it has none of "
            "algorithm.loss.correction, algorithm.loss.kl and algorithm.loss.critic"
        )
    if loss.old == "recorded" and loss.kind in _WITH_RATIO and correction.kind in _TRUNCATING:
        raise UserError(
            f"algorithm.loss.correction.kind={correction.kind}: the ratio of {loss.kind} over the "
            "recorded logprobs corrects already; set algorithm.loss.old=current, or use "
            "token_mask, icepop or sequence_mask"
        )
    if (
        loss.old == "recorded"
        and loss.kind == "sequence_clipped"
        and correction.kind in ("token_mask", "icepop")
    ):
        raise UserError(
            f"algorithm.loss.correction.kind={correction.kind}: sequence_clipped has one ratio for "
            "a whole sequence; use sequence_mask, or algorithm.loss.old=current"
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"algorithm.{name}: {value!r} is unknown; use " + " or ".join(allowed))


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"algorithm.{name}: {value} must be a number greater than 0")
