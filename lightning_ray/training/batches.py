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
from lightning_ray.spans import SpanKind, SpanStatus
from lightning_ray.spans.rewards import by_attempt
from lightning_ray.spans.rewards import rewards as held_rewards
from lightning_ray.trajectories import (
    AttemptFacts,
    BuildReport,
    Check,
    CreditConfig,
    Cut,
    HygieneConfig,
    HygieneReport,
    Member,
    Place,
    build_sequences,
    by_token,
    cut_sequences,
    distinct_spans,
    inspect,
    members,
    recorded_errors,
    require_rewards,
    step_rewards,
    tokens_per_call,
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
    """Credit per attempt of the used groups; a mean where its calls have credit of their own."""
    cut: Cut
    """What was cut from sequences that are too long."""
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
    credit: CreditConfig | None = None,
    most_tokens: int = 0,
) -> tuple[pa.Table, Batch]:
    """Builds sequences, groups them by task, and gives them the algorithm's credit.

    Returns the sequences (SEQUENCE_SCHEMA) of the groups to learn from, and what is known of them.

    `records` are the step's rollouts, ended; `spans` holds the spans of their attempts. Only the
    latest attempt of a rollout that succeeded is used: a crash or a timeout is no reward of zero.
    `settings` are those that `algorithm` was made with (None: the defaults), `credit` says what an
    attempt is worth, and sequences are cut to `most_tokens` (0: not at all). `hygiene` says what is
    done about defects (None: the defaults), `heldout` are the `task_keys` of the held-out tasks. A
    check that says to stop does not raise here: the batch's report says so. Raises UserError when
    the algorithm cannot score a group.
    """
    checks = HygieneConfig() if hygiene is None else hygiene
    spans, repeated = distinct_spans(spans, checks)
    graded = [r for r in records if r.status is RolloutStatus.SUCCEEDED and r.outcome is not None]
    groups = {record.attempt_id: record.spec.group_id for record in graded}
    sequences, report = build_sequences(spans, groups, policy)
    lengths = tokens_per_call(sequences)
    errors = recorded_errors(spans)
    learnable = {attempt for attempt, mine in lengths.items() if mine}
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
    settings = AlgorithmConfig() if settings is None else settings
    credit = CreditConfig() if credit is None else credit
    steps = step_rewards(credit, held_rewards(spans)) if credit.steps else {}
    # Also those that the agent, a service or a person gave; what the queue knows holds.
    told = {} if credit.is_plain else by_attempt(spans)
    rewards = {r.attempt_id: {**told.get(r.attempt_id, {}), **_rewards(r)} for r in graded}
    require_rewards(credit, rewards.values())
    flat_checks = (None, Check.CONSTANT_GROUPS, Check.CONSTANT_BATCHES)
    usable: dict[str, list[Member]] = {}
    attempts: dict[str, list[str]] = {}
    for record in graded:
        attempt = record.attempt_id
        if attempt not in learnable or found.dropped.get(attempt) not in flat_checks:
            continue
        parts = members(
            credit,
            attempt,
            record.spec.group_id,
            rewards[attempt],
            steps.get(attempt, {}),
            report.asked[attempt],
            lengths[attempt],
        )
        if parts is not None:
            usable[attempt] = parts
            attempts.setdefault(record.spec.group_id, []).append(attempt)
    flat = small = 0
    compared: dict[str, list[Member]] = {}
    # Other credit than an attempt's one reward may differ where that reward does not.
    contrast_needed = credit.is_plain and getattr(algorithm, "needs_contrast", True)
    for mine in attempts.values():
        if len(mine) < settings.min_group:
            small += 1
            continue
        # What is left of a group is constant as a whole or not at all.
        dropped = found.dropped.get(mine[0])
        if dropped is not None and (contrast_needed or dropped is not Check.CONSTANT_GROUPS):
            flat += 1
            continue
        for member in (part for attempt in mine for part in usable[attempt]):
            compared.setdefault(member.group, []).append(member)
    totals = {attempt: sum(mine.values()) for attempt, mine in lengths.items()}
    given, used, flat_too = _score(algorithm, settings, list(compared.items()), totals)
    chosen = pa.array(list(given), pa.string())
    kept = sequences.filter(pc.is_in(sequences["attempt_id"], value_set=chosen))
    kept, gone = cut_sequences(with_advantages(kept, by_token(kept, given)), most_tokens)
    batch = Batch(
        report=report,
        rows=kept.num_rows,
        oldest_version=_oldest_version(kept),
        rewards=mean_rewards(graded),
        used_groups=used,
        flat_groups=flat + flat_too,
        small_groups=small,
        left_out=len(records) - len(usable),
        advantages={
            attempt: float(np.mean(list(calls.values()))) for attempt, calls in given.items()
        },
        cut=gone,
        hygiene=found,
    )
    return kept, batch


def _group(
    name: str, mine: Sequence[Member], totals: Mapping[str, int], settings: AlgorithmConfig
) -> Group:
    """Members as an algorithm sees them; `totals` are the sampled tokens of whole attempts."""
    worth = np.array([member.worth for member in mine])
    whole = np.array([totals[member.attempt_id] for member in mine])
    lengths = np.array([member.length for member in mine])
    return Group(name, worth - overlong(whole, settings.overlong), lengths)


def _score(
    algorithm: Algorithm,
    settings: AlgorithmConfig,
    compared: Sequence[tuple[str, list[Member]]],
    totals: Mapping[str, int],
) -> tuple[dict[str, dict[int, float]], int, int]:
    """Credit by attempt and call; how many groups are learnt from, and how many teach nothing."""
    groups = [_group(name, mine, totals, settings) for name, mine in compared]
    credits = [score(algorithm, settings.name, group) for group in groups]
    given: dict[str, dict[int, float]] = {}
    used = flat = 0
    for (_, mine), advantages in zip(
        compared, finish(algorithm, settings.name, groups, credits), strict=True
    ):
        if not advantages.any() and not getattr(algorithm, "zero_teaches", False):
            flat += 1
            continue
        used += 1
        for member, advantage in zip(mine, advantages.tolist(), strict=True):
            given.setdefault(member.attempt_id, {}).update(dict.fromkeys(member.calls, advantage))
    return given, used, flat


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


def oldest_versions(
    records: Sequence[RolloutRecord], spans: pa.Table, policies: Sequence[str]
) -> dict[str, dict[str, int]]:
    """The oldest version that sampled a token of each group, by group and then by policy.

    Only what can be learnt from counts: whole calls of rollouts that succeeded.
    """
    groups = {r.attempt_id: r.spec.group_id for r in records if r.status is RolloutStatus.SUCCEEDED}
    calls = spans.filter(
        (pc.field("kind") == SpanKind.MODEL_CALL.value)
        & pc.field("policy").isin(pa.array(list(policies), pa.string()))
        & pc.field("attempt_id").isin(pa.array(list(groups), pa.string()))
        & (pc.field("status") == SpanStatus.OK.value)
        & pc.field("version").is_valid()
    )
    oldest: dict[str, dict[str, int]] = {}
    # A call's `version` sampled its first token, so no other of its tokens is older.
    columns = (calls[name].to_pylist() for name in ("attempt_id", "policy", "version"))
    for attempt, policy, version in zip(*columns, strict=True):
        mine = oldest.setdefault(groups[attempt], {})
        mine[policy] = min(version, mine.get(policy, version))
    return oldest


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
