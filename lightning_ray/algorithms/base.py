"""What an algorithm is: credit for the attempts of a group, and the loss in which it is used.

Invariant: nothing here imports torch, so a configuration is checked in milliseconds, before a
cluster or a model exists. An algorithm is a pure function of what it is given: it keeps no state
between groups, and a resumed run scores as the uninterrupted one would have.
"""

import importlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from lightning_ray.algorithms.config import AlgorithmConfig, LossConfig, check_numbers
from lightning_ray.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ALGORITHMS: dict[str, str] = {
    "cispo": "lightning_ray.algorithms.cispo:CISPO",
    "dapo": "lightning_ray.algorithms.dapo:DAPO",
    "dr_grpo": "lightning_ray.algorithms.dr_grpo:DrGRPO",
    "grpo": "lightning_ray.algorithms.grpo:GRPO",
    "gspo": "lightning_ray.algorithms.gspo:GSPO",
    "ppo": "lightning_ray.algorithms.ppo:PPO",
    "reinforce_pp": "lightning_ray.algorithms.reinforce_pp:ReinforcePP",
    "reinforce_pp_baseline": "lightning_ray.algorithms.reinforce_pp:ReinforcePPBaseline",
    "rloo": "lightning_ray.algorithms.rloo:RLOO",
}
"""Name in a configuration to "module:class". The class is made with an `AlgorithmConfig`."""


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
    may have fewer attempts than were asked for (those lost to a fault are left out), but not fewer
    than `min_group`. One whose credit is zero throughout teaches nothing: it is left out, counted.

    A class with `needs_contrast = False` is given groups without contrast as well, and with
    `zero_teaches = True` a group whose credit is zero throughout is learnt from; one with a method
    `finish_batch` sees the credit of the whole batch once more before it is used
    (`BatchAlgorithm`).
    """

    loss: LossConfig

    def score_group(self, group: Group) -> FloatArray:
        """The credit of each attempt, finite, float64[G]; every token of the attempt gets it."""
        ...


class BatchAlgorithm(Algorithm, Protocol):
    """An algorithm whose credit depends on the other groups of the batch."""

    def finish_batch(
        self, groups: Sequence[Group], credits: Sequence[FloatArray]
    ) -> list[FloatArray]:
        """The final credit of each group; `credits` are what `score_group` gave for them."""
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


def check_algorithm(config: AlgorithmConfig) -> None:
    """Refuse what cannot work; an algorithm of the user's own is imported and tried out.

    Raises:
        UserError: an unknown name, a number outside its range, or see `custom.try_out`.
    """
    make_algorithm(config)


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that a configuration names, checked.

    Raises:
        UserError: see `check_algorithm`.
    """
    check_numbers(config)
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
    algorithm: Algorithm = algorithm_class(config.name)(config)
    return algorithm


def algorithm_class(name: str) -> Any:
    """The class behind one of the names in `ALGORITHMS`."""
    module, _, attribute = ALGORITHMS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


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
    _check_credit(algorithm, name, "score_group", group, credit)
    return credit


def finish(
    algorithm: Algorithm, name: str, groups: Sequence[Group], credits: Sequence[FloatArray]
) -> list[FloatArray]:
    """The credit of a batch's groups, as `finish_batch` leaves it where there is one; checked.

    Raises:
        UserError: it raised, or did not give one finite number per attempt.
    """
    finish_batch = getattr(algorithm, "finish_batch", None)
    if finish_batch is None or not groups:
        return list(credits)
    try:
        with np.errstate(all="ignore"):
            final = [np.asarray(one, np.float64) for one in finish_batch(groups, credits)]
    except Exception as error:
        raise UserError(
            f"algorithm.name={name}: finish_batch raised {describe(error)} on a batch of "
            f"{len(groups)} groups"
        ) from error
    if len(final) != len(groups):
        raise UserError(
            f"algorithm.name={name}: finish_batch gave the credit of {len(final)} groups for a "
            f"batch of {len(groups)}"
        )
    for group, credit in zip(groups, final, strict=True):
        _check_credit(algorithm, name, "finish_batch", group, credit)
    return final


def _check_credit(
    algorithm: Algorithm, name: str, method: str, group: Group, credit: FloatArray
) -> None:
    if credit.shape != group.rewards.shape:
        raise UserError(
            f"algorithm.name={name}: {method} gave an array of shape {credit.shape} for a group "
            f"of {len(group.rewards)} attempts; give one number per attempt"
        )
    if not np.isfinite(credit).all():
        raise UserError(
            f"algorithm.name={name}: {method} gave {credit.tolist()} for the rewards "
            f"{group.rewards.tolist()}; give finite numbers"
        )
    own = own_loss(algorithm) is not None
    if not own and algorithm.loss.kind == "cross_entropy" and (credit < 0).any():
        raise UserError(
            f"algorithm.name={name}: {method} gave {credit.tolist()}; under "
            "algorithm.loss.kind=cross_entropy credit is a weight, so 0 or above"
        )


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
