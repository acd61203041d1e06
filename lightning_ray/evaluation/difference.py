"""What one run scored on held-out tasks against another: per task from the spans, and the interval.

Invariant: tasks are paired only where they are the same: the same id, and the same content wherever
both runs recorded it. Where nothing can be paired the difference says so (`paired` is False).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.evaluation.measures import Interval, paired_difference
from lightning_ray.spans import SPAN_SCHEMA, SpanKind
from lightning_ray.spans.rewards import by_attempt
from lightning_ray.spans.segment import SUFFIX, read_segment

_COLUMNS = ["rollout_id", "end_ns", "attributes"]
# As the conductor names the rollouts of an evaluation: step, session, place of the task, sample.
_ROLLOUT = re.compile(r"heldout-s(\d+)-([^-]+)-\d+-\d+$")


@dataclass(frozen=True)
class TaskScores:
    """What each held-out task scored in one evaluation."""

    rewards: Mapping[str, Mapping[str, float]]
    """By reward name, by task id: the mean over the task's samples that came to a reward."""
    contents: Mapping[str, str]
    """By task id, the task as canonical JSON; tasks that the spans do not hold are absent."""


@dataclass(frozen=True)
class Difference:
    """Second minus first."""

    measure: str
    interval: Interval
    """`n` is the number of pairs; of a difference that is not paired, the smaller sample's."""
    paired: bool
    unmatched: int = 0
    """Tasks of either run that the other does not have."""


def heldout_scores(spans: Path) -> dict[int, TaskScores]:
    """The scores of every held-out evaluation in a run's folder of spans, by training step.

    An evaluation that was begun twice (the run was resumed) counts as it was the last time. Only
    the columns that are needed are read. Empty where there are no spans.

    Raises:
        InfrastructureError: a segment is not of this version's schema.
    """
    rows: list[dict[str, object]] = []
    given = []
    for path in sorted(spans.rglob(f"*{SUFFIX}")):
        for _, batch in read_segment(path).batches:
            batch = batch.filter(pc.starts_with(batch["rollout_id"], "heldout-"))
            ends = batch.filter(pc.equal(batch["kind"], SpanKind.RESOURCE.value))
            rows += ends.select(_COLUMNS).to_pylist()
            given.append(batch.filter(pc.equal(batch["kind"], SpanKind.REWARD.value)))
    return _scores(rows, by_attempt(pa.Table.from_batches(given, SPAN_SCHEMA)))


def _scores(
    rows: list[dict[str, object]], given: Mapping[str, Mapping[str, float]]
) -> dict[int, TaskScores]:
    tasks: dict[str, str] = {}
    contents: dict[str, str] = {}
    # The latest attempt decides a rollout.
    latest = sorted(given, key=lambda attempt: int(attempt.rpartition("/")[2]))
    rewards = {attempt.rpartition("/")[0]: given[attempt] for attempt in latest}
    last: dict[int, tuple[int, str]] = {}
    place: dict[str, tuple[int, str]] = {}
    for row in rows:
        rollout = str(row["rollout_id"])
        match = _ROLLOUT.match(rollout)
        if match is None:
            continue
        step, session = int(match[1]), match[2]
        place[rollout] = (step, session)
        ended = int(str(row["end_ns"]))
        if step not in last or ended > last[step][0]:
            last[step] = (ended, session)
        if row["attributes"]:
            attributes = json.loads(str(row["attributes"]))
            tasks[rollout] = attributes["task_id"]
            if "task" in attributes:
                contents[rollout] = json.dumps(attributes["task"], sort_keys=True)
    found = {}
    for step, (_, session) in last.items():
        chosen = [r for r in tasks if place[r] == (step, session)]
        names = dict.fromkeys(name for rollout in chosen for name in rewards.get(rollout, ()))
        found[step] = TaskScores(
            {name: _means(chosen, tasks, rewards, name) for name in names},
            {tasks[rollout]: contents[rollout] for rollout in chosen if rollout in contents},
        )
    return found


def _means(
    rollouts: list[str],
    tasks: dict[str, str],
    rewards: Mapping[str, Mapping[str, float]],
    name: str,
) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for rollout in rollouts:
        if name in rewards.get(rollout, ()):
            values.setdefault(tasks[rollout], []).append(rewards[rollout][name])
    return {task: fmean(found) for task, found in values.items()}


def paired(
    measure: str, first: TaskScores, second: TaskScores, *, same_source: bool
) -> Difference | None:
    """The difference over the tasks that both have; None where there are fewer than two.

    `same_source` says that equal ids mean equal tasks where the spans do not hold the tasks.
    """
    one, two = first.rewards.get(measure, {}), second.rewards.get(measure, {})

    def same(task: str) -> bool:
        contents = first.contents.get(task), second.contents.get(task)
        return same_source if None in contents else contents[0] == contents[1]

    pairs = [task for task in one if task in two and same(task)]
    if len(pairs) < 2:
        return None
    interval = paired_difference([one[task] for task in pairs], [two[task] for task in pairs])
    return Difference(measure, interval, True, len(set(one) | set(two)) - len(pairs))


def unpaired(measure: str, first: Interval, second: Interval) -> Difference:
    """The difference of two independent means, from their own intervals.

    With means m and limits l, u: from d - √((m₂-l₂)² + (u₁-m₁)²) to d + √((u₂-m₂)² + (m₁-l₁)²)
    (R. G. Newcombe, "Interval estimation for the difference between independent proportions",
    1998, method 10; the same rule holds for means with any interval of their own).
    """
    distance = second.mean - first.mean
    low = math.hypot(second.mean - second.low, first.high - first.mean)
    high = math.hypot(second.high - second.mean, first.mean - first.low)
    return Difference(
        measure,
        Interval(distance, distance - low, distance + high, min(first.n, second.n)),
        False,
    )
