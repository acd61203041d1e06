"""The names of a step's metrics, where one policy learns and where several do."""

from collections.abc import Mapping, Sequence

from lightning_ray.tracking.panel import METRICS
from lightning_ray.training.trainee import Lesson

_OF_ONE = ("loss", "version")
"""Metrics that mean nothing of several policies together."""
_SUMMED = ("cut_calls", "cut_tokens", "left_out", "sampled_tokens")
"""Metrics that are added up over the policies; the findings of the checks are as well."""


def step_metrics(lessons: Mapping[str, Lesson], versions: Mapping[str, int]) -> dict[str, float]:
    """The metrics of a step's lessons, by policy; `versions` are those after it.

    Of one policy they have their plain names. Of several each name begins with its policy,
    `planner/loss`, and what can be counted together stands without it too.
    """
    each = {
        name: {"version": float(versions[name]), **lesson.metrics()}
        for name, lesson in lessons.items()
    }
    if len(each) == 1:
        return next(iter(each.values()))
    found = {f"{name}/{key}": value for name, mine in each.items() for key, value in mine.items()}
    for key in dict.fromkeys(key for mine in each.values() for key in mine):
        values = [mine[key] for mine in each.values() if key in mine]
        if key.startswith("hygiene_") or key in _SUMMED:
            found[key] = sum(values)
        elif key == "staleness":
            found[key] = max(values)
    return found


def shown_metrics(policies: Sequence[str]) -> list[str]:
    """What a person follows of a step in which these policies learn."""
    if len(policies) == 1:
        return list(METRICS)
    own = [name for name in METRICS if name in _OF_ONE]
    return [
        *(f"{policy}/{name}" for policy in policies for name in own),
        *(name for name in METRICS if name not in own),
    ]
