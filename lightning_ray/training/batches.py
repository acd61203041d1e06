"""From the rollouts of a step to the batch that the learner trains on.

Invariant: what the hygiene policies drop is gone before credit is computed, so an attempt that is
left out moves no other attempt's baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.algorithms import Algorithm, AlgorithmConfig, Group, finish, overlong, score
from lightning_ray.rollouts import RolloutRecord, RolloutStatus
from lightning_ray.trajectories import (
    AttemptFacts,
    BuildReport,
    Check,
    HygieneConfig,
    HygieneReport,
    Place,
    build_sequences,
    distinct_spans,
    inspect,
    recorded_errors,
    trainable_counts,
    with_advantages,
)


@dataclass(frozen=True)
class Batch:
    """What a step learns from, and what was left out of it; the sequences travel beside it."""

    report: BuildReport
    rows: int
    """Sequences to learn from; 0 when nothing was left, say because no group got any credit."""
    oldest_version: int | None
    """Of the tokens to learn from; None when there are none."""
    rewards: dict[str, float]
    """Mean of every named reward over the rollouts that have one."""
    used_groups: int
    flat_groups: int
    """Groups whose credit is zero throughout: nothing to learn."""
    small_groups: int
    """Groups of which fewer attempts came to a reward than `algorithm.min_group`."""
    left_out: int
    """Rollouts that came to no reward, whose tokens are not exact, or that a check dropped; those
    of flat and small groups are not among them."""
    advantages: dict[str, float]
    """Credit per attempt of the used groups."""
    hygiene: HygieneReport
    """What the checks found, and what was dropped for it."""


def make_batch(
    records: Sequence[RolloutRecord],
    spans: pa.Table,
    algorithm: Algorithm,
    policy: str,
    hygiene: HygieneConfig | None = None,
    heldout: Mapping[str, str] | None = None,
    settings: AlgorithmConfig | None = None,
) -> tuple[pa.Table, Batch]:
    """Builds sequences, groups them by task, and gives them the algorithm's credit.

    Returns the sequences (SEQUENCE_SCHEMA) of the groups to learn from, and what is known of them.

    `records` are the step's rollouts, ended; `spans` holds the spans of their attempts. Only the
    latest attempt of a rollout that succeeded is used: a crash or a timeout is no reward of zero.
    `settings` are those that `algorithm` was made with (None: the defaults). `hygiene` says what is
    done about defects (None: the defaults), `heldout` are the `task_keys` of the held-out tasks. A
    check that says to stop does not raise here: the batch's report says so. Raises UserError when
    the algorithm cannot score a group.
    """
    checks = HygieneConfig() if hygiene is None else hygiene
    spans, repeated = distinct_spans(spans, checks)
    graded = [r for r in records if r.status is RolloutStatus.SUCCEEDED and r.outcome is not None]
    groups = {record.attempt_id: record.spec.group_id for record in graded}
    sequences, report = build_sequences(spans, groups, policy)
    lengths = trainable_counts(sequences)
    errors = recorded_errors(spans)
    learnable = {attempt for attempt, length in lengths.items() if length > 0}
    found = inspect(
        spans,
        [facts for record in records for facts in _facts(record, errors)],
        checks,
        inexact=report.inexact,
        repeated=repeated,
        heldout=heldout,
        policy=policy,
        learnable=learnable,
    )
    flat_checks = (None, Check.CONSTANT_GROUPS, Check.CONSTANT_BATCHES)
    usable = [
        record
        for record in graded
        if record.attempt_id in learnable
        and "reward" in _rewards(record)
        and found.dropped.get(record.attempt_id) in flat_checks
    ]
    members: dict[str, list[RolloutRecord]] = {}
    for record in usable:
        members.setdefault(record.spec.group_id, []).append(record)
    settings = AlgorithmConfig() if settings is None else settings
    flat = small = 0
    scored: list[tuple[Group, list[RolloutRecord]]] = []
    for group_id, group_records in members.items():
        if len(group_records) < settings.min_group:
            small += 1
            continue
        # What is left of a group is constant as a whole or not at all.
        dropped = found.dropped.get(group_records[0].attempt_id)
        if dropped is not None and not (
            dropped is Check.CONSTANT_GROUPS and not getattr(algorithm, "needs_contrast", True)
        ):
            flat += 1
            continue
        group = Group(
            group_id,
            np.array([_rewards(record)["reward"] for record in group_records]),
            np.array([lengths[record.attempt_id] for record in group_records]),
        )
        scored.append((overlong(group, settings.overlong), group_records))
    groups_scored = [group for group, _ in scored]
    credits = [score(algorithm, settings.name, group) for group in groups_scored]
    credit: dict[str, float] = {}
    used = 0
    for (_, group_records), advantages in zip(
        scored, finish(algorithm, settings.name, groups_scored, credits), strict=True
    ):
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
        small_groups=small,
        left_out=len(records) - len(usable),
        advantages=credit,
        hygiene=found,
    )
    return with_advantages(kept, credit), batch


def _facts(record: RolloutRecord, errors: Mapping[str, str]) -> list[AttemptFacts]:
    """What the queue knows of a rollout's attempts; only the latest one is up for training."""
    spec = record.spec
    if not record.attempts:
        status = f"{record.status.value} before it began"
        return [AttemptFacts(spec.rollout_id, status, task_id=spec.task_id)]
    earlier = [
        AttemptFacts(attempt, status.value, error=errors.get(attempt, ""), task_id=spec.task_id)
        for attempt, status in record.attempts[:-1]
    ]
    attempt, status = record.attempts[-1]
    outcome = record.outcome
    latest = AttemptFacts(
        attempt,
        status.value,
        Place(spec.group_id, batch="step"),
        error="" if outcome is None else outcome.error,
        task_id=spec.task_id,
        task=spec.task,
        reward=_rewards(record).get("reward"),
    )
    return [*earlier, latest]


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
