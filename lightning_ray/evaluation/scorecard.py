"""The operator's measures over a set of rollouts.

Invariant: a measure whose evidence is not in the spans says so and has no number. Pure functions of
outcomes and settings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_ray.errors import UserError
from lightning_ray.evaluation.config import REWARD_PREFIX, EvaluationConfig
from lightning_ray.evaluation.measures import Interval, completion_quality, ratio, share
from lightning_ray.evaluation.outcomes import Outcome
from lightning_ray.spans.rewards import VERDICTS


@dataclass(frozen=True)
class Measure:
    """One of the operator's measures."""

    name: str
    definition: str
    unit: str
    """"reward", "share" or "usd"."""
    higher_is_better: bool
    interval: Interval | None
    """Value and 95 % interval; None where it cannot be measured."""
    missing: str = ""
    """Why it cannot be measured."""

    @property
    def title(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Scorecard:
    """What is known of a set of rollouts."""

    label: str
    rollouts: int
    failed: int
    """Those that came to no outcome of the agent; they have no reward."""
    measures: tuple[Measure, ...]
    rewards: Mapping[str, Interval]
    """The mean of every reward, by name."""

    def measure(self, name: str) -> Measure:
        """The measure of that name. Raises KeyError when there is none."""
        return {measure.name: measure for measure in self.measures}[name]


def score(outcomes: Sequence[Outcome], config: EvaluationConfig, label: str) -> Scorecard:
    """The five measures of `outcomes`.

    Raises UserError when the configuration names a reward that none of them has, while they have
    others.
    """
    names = reward_names(outcomes)
    _check_reward(config.reward, "evaluation.reward", names)
    return Scorecard(
        label=label,
        rollouts=len(outcomes),
        failed=sum(outcome.failed for outcome in outcomes),
        measures=(
            _quality(outcomes, config),
            _tool_discipline(outcomes, config, names),
            _rollbacks(outcomes, config),
            _overrides(outcomes),
            _cost(outcomes, config),
        ),
        rewards={
            name: mean for name in names if isinstance(mean := _mean(outcomes, name), Interval)
        },
    )


def reward_names(outcomes: Sequence[Outcome]) -> list[str]:
    """The names of all rewards that were given, in order of first appearance."""
    return list(dict.fromkeys(name for outcome in outcomes for name in outcome.rewards))


def rewards(outcomes: Sequence[Outcome], name: str) -> list[float]:
    """The reward `name` of every outcome that has it."""
    return [outcome.rewards[name] for outcome in outcomes if name in outcome.rewards]


def _check_reward(name: str, key: str, names: Sequence[str]) -> None:
    if names and name not in names:
        raise UserError(f"{key}={name}: no reward of that name; there are {', '.join(names)}")


def _quality(outcomes: Sequence[Outcome], config: EvaluationConfig) -> Measure:
    return _measure(
        "completion_quality",
        f"mean of the reward `{config.reward}` over the rollouts that have it",
        "reward",
        True,
        lambda: _mean(outcomes, config.reward),
    )


def _tool_discipline(
    outcomes: Sequence[Outcome], config: EvaluationConfig, names: Sequence[str]
) -> Measure:
    source = config.measures.tool_discipline
    if source.startswith(REWARD_PREFIX):
        reward = source.removeprefix(REWARD_PREFIX)
        _check_reward(reward, "evaluation.measures.tool_discipline", names)
        definition = f"mean of the reward `{reward}` over the rollouts that have it"
        return _measure(
            "tool_discipline", definition, "share", True, lambda: _mean(outcomes, reward)
        )

    def measured() -> Interval | str:
        calls = [(o.tool_calls_ok, o.tool_calls) for o in outcomes if o.tool_calls]
        if not calls:
            return "no tool_call spans"
        good, made = zip(*calls, strict=True)
        return _wider(share(sum(good), sum(made)), good, made)

    definition = "share of tool calls whose span has status ok: well formed, and it succeeded"
    return _measure("tool_discipline", definition, "share", True, measured)


def _rollbacks(outcomes: Sequence[Outcome], config: EvaluationConfig) -> Measure:
    def measured() -> Interval | str:
        observed = [outcome for outcome in outcomes if outcome.observed]
        if not observed:
            return "no tool_call or agent_step spans, and none with lightning_ray.rollback"
        return share(sum(outcome.rolled_back for outcome in observed), len(observed))

    words = ", ".join(config.measures.rollback_words)
    definition = (
        "share of the rollouts with any tool call or agent step in which one is a rollback: its "
        f"name has one of the words {words}, or a span has lightning_ray.rollback=true"
    )
    return _measure("rollback_frequency", definition, "share", False, measured)


def _overrides(outcomes: Sequence[Outcome]) -> Measure:
    def measured() -> Interval | str:
        reviewed = [outcome for outcome in outcomes if outcome.verdicts]
        if not reviewed:
            return f"no feedback spans named {', '.join(VERDICTS)}"
        return share(sum("override" in o.verdicts for o in reviewed), len(reviewed))

    definition = (
        "share of the rollouts with feedback (accept, correct or override) that have an override; "
        "a rollout that nobody looked at is left out"
    )
    return _measure("override_rate", definition, "share", False, measured)


def _cost(outcomes: Sequence[Outcome], config: EvaluationConfig) -> Measure:
    def measured() -> Interval | str:
        if not any(outcome.rewards or outcome.said for outcome in outcomes):
            return "no reward spans"
        if all(outcome.cost_usd is None and not outcome.usage for outcome in outcomes):
            return "no model_call spans, and none with cost_usd"
        for used in (used for outcome in outcomes for used in outcome.usage):
            if used.policy not in config.prices:
                return (
                    f"model_call spans of policy {used.policy!r} without cost_usd, and no "
                    f"evaluation.prices.{used.policy}"
                )
            if used.uncounted:
                return f"model_call spans of policy {used.policy!r} without cost_usd and tokens"
        resolved = [_resolved(outcome, config) for outcome in outcomes]
        if not any(resolved):
            return f"none of {len(outcomes)} rollouts is resolved"
        return ratio([cost_of(outcome, config) for outcome in outcomes], resolved)

    definition = (
        "cost of all attempts of all rollouts, divided by the number of resolved ones: as "
        f"feedback says, else those with {config.reward} >= {config.resolved_at:g}"
    )
    return _measure("cost_per_resolved", definition, "usd", False, measured)


def cost_of(outcome: Outcome, config: EvaluationConfig) -> float:
    """USD that a rollout cost. Raises KeyError where a price is missing."""
    tokens = (
        used.input_tokens * config.prices[used.policy]["input_per_million"]
        + used.output_tokens * config.prices[used.policy]["output_per_million"]
        for used in outcome.usage
    )
    return (outcome.cost_usd or 0.0) + sum(tokens) / 1e6


def _resolved(outcome: Outcome, config: EvaluationConfig) -> bool:
    if outcome.said is not None:
        return outcome.said == "resolved"
    return outcome.rewards.get(config.reward, -math.inf) >= config.resolved_at


def _mean(outcomes: Sequence[Outcome], name: str) -> Interval | str:
    tasks: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        if name in outcome.rewards:
            key = (outcome.task_id or outcome.rollout_id, outcome.task)
            tasks.setdefault(key, []).append(outcome.rewards[name])
    if not tasks:
        return "no reward spans"
    interval = completion_quality(rewards(outcomes, name))
    return _wider(interval, [sum(v) for v in tasks.values()], [len(v) for v in tasks.values()])


def _wider(interval: Interval, sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """`interval`, or the bootstrap over groups with these sums and counts where that is wider.

    Samples of one task, and calls of one rollout, resemble each other: fewer of them are news than
    their number says.
    """
    if max(counts) == 1 or len(counts) == 1:
        return interval
    grouped = ratio(sums, counts)
    low, high = min(interval.low, grouped.low), max(interval.high, grouped.high)
    return replace(interval, low=low, high=high)


def _measure(
    name: str,
    definition: str,
    unit: str,
    higher_is_better: bool,
    measured: Callable[[], Interval | str],
) -> Measure:
    found = measured()
    if isinstance(found, str):
        return Measure(name, definition, unit, higher_is_better, None, found)
    return Measure(name, definition, unit, higher_is_better, found)
