"""One HTML page of an evaluation.

Invariant: the page stands alone (no request leaves it) and shows tasks and outputs as text through
the template's escaping, never as HTML.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lightning_ray.evaluation import pictures
from lightning_ray.evaluation.comparison import Comparison
from lightning_ray.evaluation.gates import GateResult
from lightning_ray.evaluation.measures import Interval
from lightning_ray.evaluation.outcomes import Outcome
from lightning_ray.evaluation.scorecard import Scorecard, rewards

WORST = 20
"""Tasks shown."""
SAMPLES = 4
"""Rollouts shown of one task and side."""

_TEMPLATE = "page.html"


@dataclass(frozen=True)
class WorstTask:
    """A task and what came of it."""

    task_id: str
    task: str
    reward: float
    against: float | None
    samples: tuple[tuple[str, Outcome], ...]
    """Label of the side, and the rollout; the lowest rewards first."""


def render_page(
    card: Scorecard,
    against: Scorecard | None,
    comparison: Comparison | None,
    gates: Sequence[GateResult],
    outcomes: Sequence[Outcome],
    against_outcomes: Sequence[Outcome],
    reward: str,
    about: Mapping[str, Any],
) -> str:
    """The page as HTML; `reward` names the reward of the histogram and of the worst tasks."""
    labels = [card.label] + ([against.label] if against else [])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "bounds": bounds}
    return environment.get_template(_TEMPLATE).render(
        card=card,
        against=against,
        comparison=comparison,
        gates=gates,
        about=about,
        reward=reward,
        forest=pictures.forest(card, against),
        histogram=pictures.histogram(
            rewards(outcomes, reward), rewards(against_outcomes, reward), labels, reward
        ),
        paired=None if comparison is None else pictures.paired(comparison),
        worst=worst_tasks(outcomes, against_outcomes, comparison, reward, labels),
    )


def worst_tasks(
    outcomes: Sequence[Outcome],
    against: Sequence[Outcome],
    comparison: Comparison | None,
    reward: str,
    labels: Sequence[str],
) -> list[WorstTask]:
    """The tasks that lost most against the other side, or else those with the lowest reward.

    A rollout of no known task stands for itself.
    """
    ours, theirs = _by_task(outcomes, reward), _by_task(against, reward)
    pairs = {(p.task_id, p.task): p for p in comparison.pairs} if comparison else {}
    found = []
    for key, samples in ours.items():
        if comparison is not None and key not in pairs:
            continue
        shown = [(labels[0], sample) for sample in samples[:SAMPLES]]
        shown += [(labels[1], sample) for sample in theirs.get(key, [])[:SAMPLES] if against]
        mean = sum(sample.rewards[reward] for sample in samples) / len(samples)
        pair = pairs.get(key)
        found.append(WorstTask(*key, mean, pair.against if pair else None, tuple(shown)))
    found.sort(key=lambda t: (t.reward - (t.against or 0.0), t.reward, t.task_id))
    return found[:WORST]


def number(value: float | None) -> str:
    """A number as it is shown: four digits; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def bounds(interval: Interval) -> str:
    """An interval as it is shown."""
    return f"{number(interval.low)} to {number(interval.high)}"


def _by_task(outcomes: Sequence[Outcome], reward: str) -> dict[tuple[str, str], list[Outcome]]:
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: o.rewards.get(reward, math.inf)):
        if reward in outcome.rewards:
            key = (outcome.task_id or outcome.rollout_id, outcome.task)
            found.setdefault(key, []).append(outcome)
    return found
