"""What attempts and their calls are worth, before an algorithm compares them.

An attempt is worth the weighted sum of its named rewards. Where rewards came at single steps, or
are discounted, each call has a return of its own; where roles have rewards of their own, the calls
of a role are worth these, and are compared with those of the same role.

Invariant: what is compared are `Member`s of one group, and every token to learn from belongs to
exactly one member.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_ray.errors import UserError
from lightning_ray.trajectories.batch import list_arrays
from lightning_ray.trajectories.build import CallPlaces

FloatArray = npt.NDArray[np.float64]


@dataclass
class CreditConfig:
    """Which rewards an attempt is worth (Hydra group `credit`)."""

    rewards: dict[str, float] = field(default_factory=lambda: {"reward": 1.0})
    """Weights of the rewards for an attempt as a whole, by name; 0 leaves one out."""
    steps: dict[str, float] = field(default_factory=dict)
    """Weights of the rewards for single steps, by name. Step k is the attempt's k-th model call,
    from 0, whoever answered it; later ones count for the last call."""
    roles: dict[str, dict[str, float]] = field(default_factory=dict)
    """Weights in place of `rewards` for the calls of one role, by the role's name."""
    discount: float = 1.0
    """What a reward counts one call earlier, as a share; 1 for no discount."""

    @property
    def is_plain(self) -> bool:
        """Whether an attempt is worth its one reward, as its grader gave it."""
        return self == CreditConfig()

    @property
    def by_call(self) -> bool:
        """Whether calls of one attempt may be worth different things."""
        return bool(self.steps) or self.discount != 1.0


@dataclass(frozen=True)
class Member:
    """What is compared with others of its group: an attempt, a role's part of it, or a call."""

    attempt_id: str
    group: str
    calls: tuple[int, ...]
    """Those that get the credit."""
    worth: float
    length: int
    """Tokens to learn from."""


def check_credit(config: CreditConfig) -> None:
    """Refuses what cannot be computed. Raises UserError."""
    named = {"rewards": config.rewards, "steps": config.steps}
    named |= {f"roles.{role}": weights for role, weights in config.roles.items()}
    for place, weights in named.items():
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise UserError(f"credit.{place}.{name}: {weight} must be a finite number")
    of_roles = [weight for weights in config.roles.values() for weight in weights.values()]
    if not any([*config.rewards.values(), *config.steps.values(), *of_roles]):
        raise UserError("credit.rewards: every weight is 0, so nothing would be learnt; weigh one")
    if not 0 < config.discount <= 1:
        raise UserError(f"credit.discount: {config.discount} must be above 0 and at most 1")


def worth(
    config: CreditConfig, rewards: Mapping[str, float], role: str | None = None
) -> float | None:
    """The weighted sum of an attempt's rewards, for one role; None where one is missing."""
    weights = config.roles.get(role, config.rewards) if role is not None else config.rewards
    needed = {name: weight for name, weight in weights.items() if weight}
    if not needed.keys() <= rewards.keys():
        return None
    return sum(weight * rewards[name] for name, weight in needed.items())


def require_rewards(config: CreditConfig, given: Iterable[Mapping[str, float]]) -> None:
    """Refuses weights of rewards that nobody ever gave.

    `given` are the rewards of the attempts that were graded, by name. Raises UserError.
    """
    known = {name for rewards in given for name in rewards}
    for place, weights in {"rewards": config.rewards, **config.roles}.items():
        for name, weight in weights.items():
            if weight and known and name not in known:
                where = "rewards" if weights is config.rewards else f"roles.{place}"
                raise UserError(
                    f"credit.{where}.{name}: no attempt of the step has a reward of that name; "
                    f"there are: {', '.join(sorted(known))}"
                )


def returns(
    config: CreditConfig, calls: int, final: float, steps: Mapping[int, float]
) -> FloatArray:
    """What follows each call of an attempt, discounted.

        G_k = sum_{j >= k} gamma^(j - k) s_j + gamma^(K - 1 - k) R

    (Sutton and Barto, 2018, equation 3.8) with s_j the reward at step j, R that of the attempt and
    K its number of calls.

    Args:
        calls: K, at least 1.
        steps: s by step; a step after the last call counts for that.
    """
    given = np.zeros(calls)
    for step, value in steps.items():
        given[min(step, calls - 1)] += value
    given[-1] += final
    following = 0.0
    for call in range(calls - 1, -1, -1):
        following = given[call] + config.discount * following
        given[call] = following
    return given


def members(
    config: CreditConfig,
    attempt_id: str,
    group: str,
    rewards: Mapping[str, float],
    steps: Mapping[int, float],
    asked: CallPlaces,
    lengths: Mapping[int, int],
) -> list[Member] | None:
    """An attempt as what is compared; None where a reward that counts is missing.

    Args:
        group: The attempts at one task.
        rewards: Of the attempt as a whole, by name.
        steps: The weighted sum of the rewards at each step (`step_rewards`).
        asked: The attempt's calls.
        lengths: Tokens to learn from, by call; calls without any are not in it.
    """
    found: list[Member] = []
    by_role: dict[str | None, list[int]] = {}
    for call in sorted(lengths):
        role = asked.roles[call] if asked.roles[call] in config.roles else None
        by_role.setdefault(role, []).append(call)
    for role, calls in by_role.items():
        value = worth(config, rewards, role)
        if value is None:
            return None
        name = group if role is None else f"{group} {role}"
        if not config.by_call:
            length = sum(lengths[call] for call in calls)
            found.append(Member(attempt_id, name, tuple(calls), value, length))
            continue
        following = returns(config, asked.total, value, steps)
        found += [
            Member(attempt_id, name, (call,), float(following[asked.places[call]]), lengths[call])
            for call in calls
        ]
    return found


def step_rewards(config: CreditConfig, held: pa.Table) -> dict[str, dict[int, float]]:
    """By attempt, the weighted sum of the rewards at each step.

    `held` are the rewards that hold (`spans.rewards`).
    """
    found: dict[str, dict[int, float]] = {}
    columns = (held[name].to_pylist() for name in ("attempt_id", "name", "step", "value"))
    for attempt_id, name, step, value in zip(*columns, strict=True):
        weight = config.steps.get(name, 0.0)
        if step is not None and weight:
            mine = found.setdefault(attempt_id, {})
            mine[step] = mine.get(step, 0.0) + weight * value
    return found


def tokens_per_call(sequences: pa.Table) -> dict[str, dict[int, int]]:
    """Tokens to learn from by attempt and call, in the order of first appearance."""
    offsets, calls = list_arrays(sequences["calls"])
    counts: dict[str, dict[int, int]] = {}
    for row, attempt_id in enumerate(sequences["attempt_id"].to_pylist()):
        mine = counts.setdefault(attempt_id, {})
        numbers, many = np.unique(calls[offsets[row] : offsets[row + 1]], return_counts=True)
        for call, count in zip(numbers.tolist(), many.tolist(), strict=True):
            if call >= 0:
                mine[call] = mine.get(call, 0) + count
    return counts


def by_token(
    sequences: pa.Table, credit: Mapping[str, Mapping[int, float]]
) -> dict[str, FloatArray]:
    """Credit by attempt and call as credit by trainable token, as `with_advantages` takes it.

    A call without credit has 0.
    """
    offsets, calls = list_arrays(sequences["calls"])
    parts: dict[str, list[FloatArray]] = {}
    for row, attempt_id in enumerate(sequences["attempt_id"].to_pylist()):
        mine = calls[offsets[row] : offsets[row + 1]]
        mine = mine[mine >= 0]
        given = credit.get(attempt_id, {})
        table = np.zeros(int(mine.max(initial=-1)) + 1)
        for call, value in given.items():
            if call < len(table):
                table[call] = value
        parts.setdefault(attempt_id, []).append(table[mine])
    return {attempt_id: np.concatenate(some) for attempt_id, some in parts.items()}
