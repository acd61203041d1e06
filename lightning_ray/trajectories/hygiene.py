"""Data hygiene: what is wrong with the attempts of a batch, or of a folder of spans.

Pure functions over Arrow tables of `SPAN_SCHEMA`. Invariant: a check looks at one kind of defect.
An attempt that came to no outcome is an infrastructure fault, and its trace and its reward are not
judged besides; what a policy drops is gone before groups are compared.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.rewards import GRADER, by_attempt, reward_history, whole_attempt
from lightning_ray.spans.schema import SpanKind, SpanStatus
from lightning_ray.trajectories.batch import list_arrays
from lightning_ray.trajectories.hygiene_attempts import (
    SUCCEEDED,
    AttemptFacts,
    attributes_of,
    end_spans,
    task_key,
)
from lightning_ray.trajectories.hygiene_config import Check, HygieneConfig, HygienePolicy
from lightning_ray.trajectories.hygiene_report import Finding, HygieneReport

LOGPROB_TOLERANCE = 1e-3
"""How far above zero rounding may carry a logprob."""

CUT_REASONS = ("length", "abort")
"""Finish reasons of a call that did not come to its end."""

REWARD = "reward"
"""The named reward that credit is computed from."""


def distinct_spans(spans: pa.Table, config: HygieneConfig) -> tuple[pa.Table, list[Finding]]:
    """The rows whose span id was there before, as findings, and the table to go on with.

    The table is without them where the policy is to drop; the first row of an id stays.
    """
    if config.duplicate_spans is HygienePolicy.off or spans.num_rows == 0:
        return spans, []
    # A group by that keeps the first place of each id.
    places = pa.table({"id": spans["span_id"], "place": np.arange(spans.num_rows)})
    first = places.group_by("id").aggregate([("place", "min")])["place_min"].to_numpy()
    if len(first) == spans.num_rows:
        return spans, []
    repeated = np.setdiff1d(np.arange(spans.num_rows), first)
    rows = spans.select(["span_id", "attempt_id", "kind"]).take(pa.array(repeated)).to_pylist()
    findings = [
        Finding(
            Check.DUPLICATE_SPANS,
            f"a {row['kind']} of attempt {row['attempt_id']} has an id that was there before",
            span_id=row["span_id"],
        )
        for row in rows
    ]
    if config.duplicate_spans is HygienePolicy.drop:
        spans = spans.take(pa.array(np.sort(first)))
    return spans, findings


def inspect(
    spans: pa.Table,
    attempts: Sequence[AttemptFacts],
    config: HygieneConfig,
    *,
    inexact: Mapping[str, str],
    repeated: Sequence[Finding] = (),
    heldout: Mapping[str, str] | None = None,
    policy: str | None = None,
    learnable: Collection[str] | None = None,
) -> HygieneReport:
    """Makes every check that is not off.

    Args:
        spans: rows of `SPAN_SCHEMA`; rows of attempts that are not in `attempts` are ignored.
        attempts: the attempts to judge.
        inexact: attempt id to reason, for attempts that `rebuild_trees` or `build_sequences` could
            not rebuild; `inexact_tokens` counts these and what it finds itself.
        repeated: the findings of `distinct_spans`.
        heldout: `task_keys` of the held-out tasks; None makes no check for leakage.
        policy: only calls of this policy must have tokens, logprobs and a version; None: all.
        learnable: attempts that have a token to learn from; only these are compared with each
            other in a group. None: all.
    """
    report = HygieneReport.empty(config)
    if heldout is None:
        report.counts.pop(Check.LEAKAGE, None)
    report.add(repeated, config.offenders)
    known = pa.array([facts.attempt_id for facts in attempts], pa.string())
    spans = spans.filter(pc.is_in(spans["attempt_id"], value_set=known))
    calls = spans.filter(pc.equal(spans["kind"], SpanKind.MODEL_CALL.value))
    rewards = _rewards(spans)
    ended_well = [facts for facts in attempts if facts.status is None or facts.succeeded]
    for findings in (
        _faults(attempts, calls),
        _inexact(ended_well, calls, inexact, policy),
        _empty(ended_well, calls),
        _cut(ended_well, spans, calls),
        _missing_rewards(ended_well, rewards),
        _contradictions(attempts, spans, rewards),
        _leaks(attempts, heldout or {}),
        _duplicate_samples(ended_well, calls, config.max_duplicate_share),
        _duplicate_tasks(attempts),
    ):
        report.add(list(findings), config.offenders)
    compared = [
        facts
        for facts in ended_well
        if facts.attempt_id not in report.dropped
        and (learnable is None or facts.attempt_id in learnable)
    ]
    report.add(list(_constant(compared, rewards)), config.offenders)
    return report


@dataclass(frozen=True)
class _Rewards:
    """What was given to attempts as a whole, by attempt and name."""

    held: Mapping[str, Mapping[str, float]]
    """What holds (`spans.rewards`)."""
    graded: Mapping[str, Mapping[str, Sequence[float]]]
    """Every value of a grader, in order of arrival. Others may change their mind; it may not."""
    named: frozenset[tuple[str, str]]
    """Attempt and name of every reward span, whether its value is a number or not."""


def _rewards(spans: pa.Table) -> _Rewards:
    rows = spans.filter(pc.equal(spans["kind"], SpanKind.REWARD.value))
    names = zip(rows["attempt_id"].to_pylist(), rows["name"].to_pylist(), strict=True)
    graded: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    history = whole_attempt(reward_history(rows))
    history = history.filter(pc.equal(history["source"], GRADER))
    for attempt, name, value in zip(
        *(history[column].to_pylist() for column in ("attempt_id", "name", "value")), strict=True
    ):
        graded[attempt][name].append(value)
    return _Rewards(by_attempt(rows), graded, frozenset(names))


def _worth(facts: AttemptFacts, rewards: _Rewards) -> float | None:
    """What an attempt is worth; None where it has no finite reward."""
    if facts.reward is not None:
        return facts.reward
    return rewards.held.get(facts.attempt_id, {}).get(REWARD)


def _faults(attempts: Sequence[AttemptFacts], calls: pa.Table) -> Iterator[Finding]:
    failed = calls.filter(pc.equal(calls["status"], SpanStatus.ERROR.value))
    broken = dict(zip(failed["attempt_id"].to_pylist(), failed["span_id"].to_pylist(), strict=True))
    for facts in attempts:
        if facts.status is not None and not facts.succeeded:
            error = " ".join(facts.error.split())
            # The end of a traceback says what it was.
            shown = error if len(error) <= 300 else f"{error[:80]} ... {error[-200:]}"
            reason = f"{facts.status}: {shown}" if shown else facts.status
        elif facts.attempt_id in broken:
            reason = f"model call {broken[facts.attempt_id]} failed"
        else:
            continue
        yield Finding(Check.INFRASTRUCTURE_FAULTS, reason, (facts.attempt_id,))


def _inexact(
    attempts: Sequence[AttemptFacts],
    calls: pa.Table,
    inexact: Mapping[str, str],
    policy: str | None,
) -> Iterator[Finding]:
    reasons = dict(inexact)
    ours = np.ones(calls.num_rows, np.bool_)
    if policy is not None:
        ours = pc.fill_null(pc.equal(calls["policy"], policy), False).to_numpy()
    good = pc.equal(calls["status"], SpanStatus.OK.value).to_numpy()
    offsets, logprobs = list_arrays(calls["logprobs"])
    wrong = np.flatnonzero(~np.isfinite(logprobs) | (logprobs > LOGPROB_TOLERANCE))
    impossible = np.zeros(calls.num_rows, np.bool_)
    impossible[np.searchsorted(offsets, wrong, side="right") - 1] = True
    token_offsets, _ = list_arrays(calls["token_ids"])
    versioned = pc.is_valid(calls["version"]).to_numpy()
    ids = calls["attempt_id"].to_pylist()
    names = calls["span_id"].to_pylist()
    for mask, what in (
        (good & ours & (np.diff(token_offsets) == 0), "has no tokens"),
        (good & ours & (np.diff(offsets) == 0), "has no logprobs"),
        (ours & (np.diff(offsets) > np.diff(token_offsets)), "has more logprobs than tokens"),
        (ours & impossible, "has a logprob that is not finite or is above zero"),
        (good & ours & ~versioned, "does not say which version sampled it"),
    ):
        for row in np.flatnonzero(mask):
            reasons.setdefault(ids[row], f"call {names[row]} {what}")
    for facts in attempts:
        if facts.attempt_id in reasons:
            yield Finding(Check.INEXACT_TOKENS, reasons[facts.attempt_id], (facts.attempt_id,))


def _empty(attempts: Sequence[AttemptFacts], calls: pa.Table) -> Iterator[Finding]:
    called = set(pc.unique(calls["attempt_id"]).to_pylist())
    for facts in attempts:
        if facts.succeeded and facts.attempt_id not in called:
            yield Finding(Check.EMPTY_TRACES, "it made no model call", (facts.attempt_id,))


def _cut(attempts: Sequence[AttemptFacts], spans: pa.Table, calls: pa.Table) -> Iterator[Finding]:
    ended = {row["attempt_id"] for row in end_spans(spans)}
    cut = pc.or_(
        pc.equal(calls["status"], SpanStatus.ABORTED.value),
        pc.fill_null(pc.is_in(calls["finish_reason"], value_set=pa.array(CUT_REASONS)), False),
    )
    rows = calls.select(["attempt_id", "span_id", "status", "finish_reason"]).filter(cut)
    reasons: dict[str, str] = {}
    for row in rows.to_pylist():
        how = "was abandoned" if row["status"] == SpanStatus.ABORTED else "was cut off"
        why = f"call {row['span_id']} {how} (finish reason {row['finish_reason']})"
        reasons.setdefault(row["attempt_id"], why)
    for facts in attempts:
        reason = reasons.get(facts.attempt_id)
        if reason is None and facts.attempt_id not in ended:
            reason = "nothing says how it ended"
        if reason is not None:
            yield Finding(Check.CUT_TRACES, reason, (facts.attempt_id,))


def _missing_rewards(attempts: Sequence[AttemptFacts], rewards: _Rewards) -> Iterator[Finding]:
    for facts in attempts:
        if facts.succeeded and REWARD not in rewards.held.get(facts.attempt_id, {}):
            given = (facts.attempt_id, REWARD) in rewards.named
            reason = "its reward is not a finite number" if given else f'it has no "{REWARD}"'
            yield Finding(Check.MISSING_REWARDS, reason, (facts.attempt_id,))


def _contradictions(
    attempts: Sequence[AttemptFacts], spans: pa.Table, rewards: _Rewards
) -> Iterator[Finding]:
    ends: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in end_spans(spans):
        status = str(attributes_of(row).get("status", ""))
        ends[row["attempt_id"]].append((row["status"], status))
    for facts in attempts:
        reason = _contradiction(
            facts, ends.get(facts.attempt_id, []), rewards.graded.get(facts.attempt_id, {})
        )
        if reason is not None:
            yield Finding(Check.CONTRADICTORY_REWARDS, reason, (facts.attempt_id,))


def _contradiction(
    facts: AttemptFacts,
    ends: Sequence[tuple[str, str]],
    graded: Mapping[str, Sequence[float]],
) -> str | None:
    """Why what is said of an attempt cannot all be true; None when it can."""
    for name, values in graded.items():
        distinct = sorted(set(values))
        if len(distinct) > 1:
            return f"{name!r} is {distinct[0]:g} and {distinct[-1]:g}"
        if name == REWARD and facts.reward is not None and distinct not in ([], [facts.reward]):
            return f"{name!r} is {distinct[0]:g} in its spans and {facts.reward:g} in the queue"
    if len({status for _, status in ends}) > 1:
        return f"it ended {' and '.join(sorted({status for _, status in ends}))}"
    for span_status, status in ends:
        if status and (span_status == SpanStatus.OK) != (status == SUCCEEDED):
            return f"its end is recorded as {span_status} and as {status}"
    if facts.succeeded and facts.error.strip():
        return f"it succeeded, yet with the error {' '.join(facts.error.split())[:200]!r}"
    if facts.status is not None and not facts.succeeded and graded:
        return f"it {facts.status.replace('_', ' ')}, yet has a reward"
    return None


def _leaks(attempts: Sequence[AttemptFacts], heldout: Mapping[str, str]) -> Iterator[Finding]:
    if not heldout:
        return
    for facts in attempts:
        if not facts.place.learnt or facts.task is None:
            continue
        if (held := heldout.get(task_key(facts.task))) is not None:
            reason = f"its task {facts.task_id or '(no id)'} is the held-out task {held}"
            yield Finding(Check.LEAKAGE, reason, (facts.attempt_id,))


def _duplicate_samples(
    attempts: Sequence[AttemptFacts], calls: pa.Table, max_share: float
) -> Iterator[Finding]:
    samples = _sampled(calls)
    for group, members in _groups(attempts).items():
        first: dict[tuple[bytes, ...], str] = {}
        repeats: list[tuple[str, str]] = []
        with_tokens = [facts.attempt_id for facts in members if facts.attempt_id in samples]
        for attempt in with_tokens:
            original = first.setdefault(samples[attempt], attempt)
            if original != attempt:
                repeats.append((attempt, original))
        if not repeats or len(repeats) <= max_share * len(with_tokens):
            continue
        for attempt, original in repeats:
            reason = (
                f"its tokens are those of {original}; of {len(with_tokens)} samples of {group} "
                f"{len(first)} differ"
            )
            yield Finding(Check.DUPLICATE_SAMPLES, reason, (attempt,))


def _sampled(calls: pa.Table) -> dict[str, tuple[bytes, ...]]:
    """For each attempt the tokens that its calls sampled, in order of `sequence`."""
    token_offsets, tokens = list_arrays(calls["token_ids"])
    offsets, _ = list_arrays(calls["logprobs"])
    counts = np.diff(offsets)
    ordered: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
    for row, (attempt, sequence) in enumerate(
        zip(calls["attempt_id"].to_pylist(), calls["sequence"].to_pylist(), strict=True)
    ):
        end = token_offsets[row + 1]
        begin = max(token_offsets[row], end - counts[row])
        if begin < end:
            ordered[attempt].append((sequence, tokens[begin:end].tobytes()))
    return {
        attempt: tuple(sampled for _, sampled in sorted(pieces, key=lambda piece: piece[0]))
        for attempt, pieces in ordered.items()
    }


def _duplicate_tasks(attempts: Sequence[AttemptFacts]) -> Iterator[Finding]:
    seen: dict[tuple[str, str], str] = {}
    for group, members in _groups(attempts).items():
        one = members[0]
        key = task_key(one.task) if one.task else one.task_id and f"id {one.task_id}"
        if not key or one.place.batch is None:
            continue
        other = seen.setdefault((one.place.batch, key), group)
        if other != group:
            reason = f"its task {one.task_id or '(no id)'} is that of group {other}"
            ids = tuple(facts.attempt_id for facts in members)
            yield Finding(Check.DUPLICATE_TASKS, reason, ids, group=group)


def _constant(attempts: Sequence[AttemptFacts], rewards: _Rewards) -> Iterator[Finding]:
    """Groups without contrast, then batches that have no other."""
    batches: dict[str, list[tuple[bool, Sequence[str]]]] = defaultdict(list)
    for group, members in _groups(attempts).items():
        worth = {facts.attempt_id: _worth(facts, rewards) for facts in members}
        values = [value for value in worth.values() if value is not None]
        if not values:
            continue
        ids = tuple(attempt for attempt, value in worth.items() if value is not None)
        constant = min(values) == max(values)
        if members[0].place.batch is not None:
            batches[members[0].place.batch].append((constant, ids))
        if constant:
            many = f"{len(ids)} attempts are" if len(ids) > 1 else "one attempt is"
            reason = f"its {many} worth {values[0]:g}"
            yield Finding(Check.CONSTANT_GROUPS, reason, ids, group=group)
    for batch, groups in batches.items():
        if all(constant for constant, _ in groups):
            reason = f"no group of batch {batch} has any contrast"
            ids = tuple(attempt for _, members in groups for attempt in members)
            yield Finding(Check.CONSTANT_BATCHES, reason, ids, group=None)


def _groups(attempts: Sequence[AttemptFacts]) -> dict[str, list[AttemptFacts]]:
    """The attempts to learn from, by group; those of no group are compared with nobody."""
    groups: dict[str, list[AttemptFacts]] = defaultdict(list)
    for facts in attempts:
        if facts.place.learnt and facts.place.group is not None:
            groups[facts.place.group].append(facts)
    return groups
