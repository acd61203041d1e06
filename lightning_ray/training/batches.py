"""From the rollouts of a step to the batch that the learner trains on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.algorithms import Algorithm, Group, score
from lightning_ray.rollouts import RolloutRecord, RolloutStatus
from lightning_ray.trajectories import (
    BuildReport,
    build_sequences,
    trainable_counts,
    with_advantages,
)


@dataclass(frozen=True)
class Batch:
    """What a step learns from, and what was left out of it; the sequences travel beside it."""

    report: BuildReport
    rows: int
    """Sequences to learn from; 0 when no group got any credit."""
    oldest_version: int | None
    """Of the tokens to learn from; None when there are none."""
    rewards: dict[str, float]
    """Mean of every named reward over the rollouts that have one."""
    used_groups: int
    flat_groups: int
    """Groups whose credit is zero throughout: nothing to learn."""
    left_out: int
    """Rollouts that came to no reward, or whose tokens are not exact."""
    advantages: dict[str, float]
    """Credit per attempt of the used groups."""


def make_batch(
    records: Sequence[RolloutRecord],
    spans: pa.Table,
    algorithm: Algorithm,
    policy: str,
    name: str = "grpo",
) -> tuple[pa.Table, Batch]:
    """Builds sequences, groups them by task, and gives them the algorithm's credit.

    Returns the sequences (SEQUENCE_SCHEMA) of the groups to learn from, and what is known of them.

    `records` are the step's rollouts, ended; `spans` holds the spans of their latest attempts. Only
    a rollout that succeeded is used: a crash or a timeout is no reward of zero. `name` is what the
    configuration calls the algorithm. Raises UserError when it cannot score a group.
    """
    graded = [r for r in records if r.status is RolloutStatus.SUCCEEDED and r.outcome is not None]
    groups = {record.attempt_id: record.spec.group_id for record in graded}
    sequences, report = build_sequences(spans, groups, policy)
    lengths = trainable_counts(sequences)
    usable = [record for record in graded if lengths.get(record.attempt_id, 0) > 0]
    members: dict[str, list[RolloutRecord]] = {}
    for record in usable:
        members.setdefault(record.spec.group_id, []).append(record)
    credit: dict[str, float] = {}
    used = flat = 0
    for group_id, group_records in members.items():
        group = Group(
            group_id,
            np.array([_rewards(record)["reward"] for record in group_records]),
            np.array([lengths[record.attempt_id] for record in group_records]),
        )
        advantages = score(algorithm, name, group)
        if not advantages.any():
            flat += 1
            continue
        used += 1
        for record, advantage in zip(group_records, advantages, strict=True):
            credit[record.attempt_id] = float(advantage)
    chosen = pa.array(list(credit), pa.string())
    kept = sequences.filter(pc.is_in(sequences["attempt_id"], value_set=chosen))
    batch = Batch(
        report=report,
        rows=kept.num_rows,
        oldest_version=_oldest_version(kept),
        rewards=mean_rewards(graded),
        used_groups=used,
        flat_groups=flat,
        left_out=len(records) - len(usable),
        advantages=credit,
    )
    return with_advantages(kept, credit), batch


def _oldest_version(sequences: pa.Table) -> int | None:
    sampled = pc.list_flatten(sequences["versions"])
    sampled = sampled.filter(pc.greater_equal(sampled, 0))
    return pc.min(sampled).as_py()


def mean_rewards(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """The mean of every named reward over the records that have one."""
    named: dict[str, list[float]] = {}
    for record in records:
        for name, value in _rewards(record).items():
            named.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in named.items()}


def _rewards(record: RolloutRecord) -> dict[str, float]:
    return record.outcome.rewards if record.outcome is not None else {}
