"""Clean data has no findings; a defect put into it is found by its own check, and counted."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hygiene_support import CleanAttempt, Folder, Row, clean_attempt, end_attributes, folders
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.errors import UserError
from lightning_ray.spans import SPAN_SCHEMA, new_span_id, to_batch
from lightning_ray.training.names import place_of
from lightning_ray.trajectories import (
    Check,
    HygieneConfig,
    HygienePolicy,
    attempts_of_spans,
    check_hygiene,
    inspect,
    task_key,
)

Defect = Callable[[CleanAttempt], None]


@given(folders())
def test_clean_data_has_no_findings(folder: Folder) -> None:
    report = folder.report()
    assert set(report.counts) == set(Check) and not any(report.counts.values())
    assert report.offenders == {} and report.dropped == {}
    assert report.why_stopped("here") is None


def _end(attempt: CleanAttempt, recorded: str = "ok", /, **changes: Any) -> None:
    attempt.end["attributes"] = json.dumps(end_attributes(attempt.task, "g", **changes))
    attempt.end["status"] = recorded


def _change_call(attempt: CleanAttempt, **columns: Any) -> None:
    attempt.calls[-1].update(columns)


def _crash(attempt: CleanAttempt) -> None:
    _end(attempt, "error", status="failed", error="exit code 3\nTraceback ...", exit_code=3)
    attempt.rewards.clear()
    # What a crash leaves besides is the crash's doing.
    attempt.calls[-1].update(status="aborted", finish_reason=None)


def _no_calls(attempt: CleanAttempt) -> None:
    attempt.calls.clear()


def _never_ended(attempt: CleanAttempt) -> None:
    attempt.end["name"] = "something else"


def _second_reward(attempt: CleanAttempt) -> None:
    again = {"span_id": new_span_id(), "value": attempt.rewards[0]["value"] + 0.5}
    attempt.rewards.append({**attempt.rewards[0], **again})


def _reward(value: float | None) -> Defect:
    def change(attempt: CleanAttempt) -> None:
        attempt.rewards[0]["value"] = value

    return change


DEFECTS: dict[str, tuple[Check, Defect]] = {
    "no tokens": (
        Check.INEXACT_TOKENS,
        lambda a: _change_call(a, token_ids=None, logprobs=None),
    ),
    "no logprobs": (Check.INEXACT_TOKENS, lambda a: _change_call(a, logprobs=None)),
    "empty logprobs": (Check.INEXACT_TOKENS, lambda a: _change_call(a, logprobs=[])),
    "more logprobs than tokens": (
        Check.INEXACT_TOKENS,
        lambda a: _change_call(a, token_ids=a.calls[-1]["token_ids"][-1:], logprobs=[-1.0, -1.0]),
    ),
    "a logprob of NaN": (Check.INEXACT_TOKENS, lambda a: _spoil_logprob(a, math.nan)),
    "a logprob of -inf": (Check.INEXACT_TOKENS, lambda a: _spoil_logprob(a, -math.inf)),
    "a positive logprob": (Check.INEXACT_TOKENS, lambda a: _spoil_logprob(a, 0.5)),
    "continues nothing": (Check.INEXACT_TOKENS, lambda a: _change_call(a, continues="lost")),
    "prefix longer than its parent": (
        Check.INEXACT_TOKENS,
        lambda a: _change_call(a, continues=a.calls[0]["span_id"], prefix_tokens=10_000),
    ),
    "no version": (Check.INEXACT_TOKENS, lambda a: _change_call(a, version=None)),
    "no call": (Check.EMPTY_TRACES, _no_calls),
    "cut at its length": (Check.CUT_TRACES, lambda a: _change_call(a, finish_reason="length")),
    "aborted by the engine": (Check.CUT_TRACES, lambda a: _change_call(a, finish_reason="abort")),
    "abandoned call": (Check.CUT_TRACES, lambda a: _change_call(a, status="aborted")),
    "never ended": (Check.CUT_TRACES, _never_ended),
    "no reward": (Check.MISSING_REWARDS, lambda a: a.rewards.pop(0)),
    "null reward": (Check.MISSING_REWARDS, _reward(None)),
    "infinite reward": (Check.MISSING_REWARDS, _reward(math.inf)),
    "two rewards": (Check.CONTRADICTORY_REWARDS, _second_reward),
    "succeeded with a failed grader": (
        Check.CONTRADICTORY_REWARDS,
        lambda a: _end(a, error="grader: KeyError"),
    ),
    "ok and failed": (Check.CONTRADICTORY_REWARDS, lambda a: _end(a, "error")),
    "crash": (Check.INFRASTRUCTURE_FAULTS, _crash),
    "failed call": (Check.INFRASTRUCTURE_FAULTS, lambda a: _change_call(a, status="error")),
}


def _spoil_logprob(attempt: CleanAttempt, value: float) -> None:
    attempt.calls[0]["logprobs"] = [*attempt.calls[0]["logprobs"][:-1], value]


# Groups are judged without what is dropped, so contrast is looked at elsewhere.
ALONE: dict[str, Any] = {
    "constant_groups": HygienePolicy.off,
    "constant_batches": HygienePolicy.off,
}


@pytest.mark.parametrize("name", DEFECTS)
@settings(max_examples=10)
@given(folder=folders(), data=st.data())
def test_a_defect_is_found_by_exactly_its_check(
    name: str, folder: Folder, data: st.DataObject
) -> None:
    check, spoil = DEFECTS[name]
    attempts = [attempt for group in folder.groups for attempt in group]
    chosen = data.draw(st.sets(st.sampled_from(range(len(attempts))), min_size=1))
    for index in chosen:
        spoil(attempts[index])
    assert folder.found(**ALONE) == {check.value: len(chosen)}
    report = folder.report(**ALONE)
    spoilt = {attempts[index].attempt_id for index in chosen}
    dropped = spoilt if report.policies[check] is HygienePolicy.drop else set()
    assert set(report.dropped) == dropped and set(report.dropped.values()) <= {check}
    named = report.offenders[check]
    assert len(named) == min(len(chosen), 5) and all(finding.reason for finding in named)
    assert {attempt for finding in named for attempt in finding.attempts} <= spoilt


@given(folders(), st.data())
def test_a_repeated_span_is_found_and_its_repetition_left_out(
    folder: Folder, data: st.DataObject
) -> None:
    rows = folder.table().to_pylist()
    extra = [rows[n] for n in data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))]
    assert folder.found(extra) == {"duplicate_spans": len(extra)}
    # The attempts themselves stay.
    assert folder.report(extra).dropped == {}


@given(folders())
def test_repeated_samples_are_found_beyond_a_share(folder: Folder) -> None:
    group = folder.groups[0]
    for attempt in group:
        attempt.calls[:] = attempt.calls[:1]
        for name in ("token_ids", "logprobs"):
            attempt.calls[0][name] = group[0].calls[0][name]
    repeated = len(group) - 1
    found = {"duplicate_samples": repeated} if repeated > len(group) / 2 else {}
    assert folder.found() == found
    assert folder.found(max_duplicate_share=1.0) == {}
    report = folder.report(max_duplicate_share=0.0, duplicate_samples=HygienePolicy.drop, **ALONE)
    assert set(report.dropped) == {attempt.attempt_id for attempt in group[1:]}


@given(folders())
def test_a_group_and_a_batch_without_contrast_are_found(folder: Folder) -> None:
    for attempt in folder.groups[0]:
        attempt.rewards[0]["value"] = 0.1
    assert folder.found() == {"constant_groups": 1}
    assert set(folder.report().dropped) == {a.attempt_id for a in folder.groups[0]}
    for group in folder.groups[1:]:
        for attempt in group:
            attempt.rewards[0]["value"] = 1.0
    assert folder.found() == {"constant_groups": len(folder.groups), "constant_batches": 1}


def test_a_group_that_has_no_contrast_once_faults_are_dropped_is_constant() -> None:
    folder = _two_groups()
    _crash(folder.groups[0][1])
    assert folder.found() == {"infrastructure_faults": 1, "constant_groups": 1}
    kept = folder.found(infrastructure_faults=HygienePolicy.warn)
    assert kept == {"infrastructure_faults": 1, "constant_groups": 1}


def test_what_is_dropped_gives_a_group_no_contrast_and_what_is_kept_does() -> None:
    folder = _two_groups()
    _second_reward(folder.groups[0][1])
    assert folder.found() == {"contradictory_rewards": 1, "constant_groups": 1}
    kept = folder.found(contradictory_rewards=HygienePolicy.warn)
    assert kept == {"contradictory_rewards": 1}


@pytest.mark.parametrize("source", ["agent", "person", "service"])
def test_what_others_say_of_an_attempt_contradicts_no_grader(source: str) -> None:
    folder = _two_groups()
    _second_reward(folder.groups[0][1])
    folder.groups[0][1].rewards[-1]["source"] = source
    assert folder.found(**ALONE) == {}


@given(folders())
def test_the_same_task_in_two_groups_is_found(folder: Folder) -> None:
    for attempt in folder.groups[1]:
        attempt.task = {**folder.groups[0][0].task, "id": "another id"}
        _end(attempt)
    assert folder.found() == {"duplicate_tasks": 1}
    (finding,) = folder.report().offenders[Check.DUPLICATE_TASKS]
    assert set(finding.attempts) == {attempt.attempt_id for attempt in folder.groups[1]}


@given(folders())
def test_a_held_out_task_is_found_however_it_is_written(folder: Folder) -> None:
    written = {"answer": 18.0, "id": "train-7", "question": "  what IS\n9  plus 9? "}
    for attempt in folder.groups[0]:
        attempt.task = written
        _end(attempt)
    assert folder.found() == {"leakage": len(folder.groups[0])}
    message = folder.report().why_stopped("in step 3")
    assert message is not None and len(message.splitlines()) == 1
    for part in ("hygiene.leakage=stop", "in step 3", folder.groups[0][0].attempt_id):
        assert part in message
    assert "train-7 is the held-out task heldout-0" in message and "hygiene.leakage=drop" in message


def test_rollouts_that_only_measure_may_have_held_out_tasks() -> None:
    folder = _two_groups()
    for attempt in (a for group in folder.groups for a in group):
        attempt.task = folder.heldout[0]
        _end(attempt)
        for row in [*attempt.calls, attempt.end, *attempt.rewards]:
            row["rollout_id"] = "heldout-" + row["rollout_id"]
            row["attempt_id"] = "heldout-" + row["attempt_id"]
    assert folder.found() == {}


def test_a_step_trained_twice_has_groups_of_its_own() -> None:
    folder = _two_groups()
    for attempt in folder.groups[1]:
        attempt.task = folder.groups[0][0].task
        _end(attempt)
        for row in [*attempt.calls, attempt.end, *attempt.rewards]:
            for name in ("rollout_id", "attempt_id"):
                row[name] = row[name].replace("abc123-0001", "def456-0000")
    assert folder.found() == {}


@pytest.mark.parametrize("policy", HygienePolicy)
def test_a_policy_decides_what_is_done(policy: HygienePolicy) -> None:
    folder = _two_groups()
    folder.groups[0][0].rewards.pop(0)
    report = folder.report(missing_rewards=policy, **ALONE)
    assert report.counts.get(Check.MISSING_REWARDS) == (None if policy == "off" else 1)
    assert len(report.dropped) == (policy == "drop")
    assert (report.why_stopped("here") is not None) == (policy == "stop")
    expected = {} if policy == "off" else {"hygiene_missing_rewards": 1.0}
    metrics = report.metrics()
    assert {name: value for name, value in metrics.items() if value} == expected
    assert ("hygiene_missing_rewards" in metrics) == (policy != "off")


def test_calls_of_another_policy_need_no_tokens() -> None:
    spans = _two_groups().table()
    rows = spans.to_pylist()
    for row in rows:
        if row["kind"] == "model_call":
            row.update(version=None)
    table = pa.Table.from_batches([to_batch(rows)], SPAN_SCHEMA)
    attempts = attempts_of_spans(table, place_of)
    for policy, expected in (("policy", 4), (None, 4), ("another", 0)):
        report = inspect(table, attempts, HygieneConfig(), inexact={}, policy=policy)
        assert report.counts[Check.INEXACT_TOKENS] == expected


def test_nothing_to_check_is_clean() -> None:
    report = inspect(SPAN_SCHEMA.empty_table(), [], HygieneConfig(), inexact={}, heldout={})
    assert set(report.counts) == set(Check) and not any(report.counts.values())


@given(
    st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.booleans()),
    st.randoms(),
)
def test_the_key_of_a_task_does_not_know_its_id_or_its_order(task: Row, random) -> None:
    task.pop("id", None)
    items = list(task.items())
    random.shuffle(items)
    assert task_key({**dict(items), "id": "x"}) == task_key({"id": "y", **copy.deepcopy(task)})
    assert task_key({**task, "one more": 1}) != task_key(task)


@pytest.mark.parametrize(
    ("setting", "value"), [("max_duplicate_share", 1.5), ("max_duplicate_share", math.nan)]
)
def test_a_share_out_of_range_is_refused(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"hygiene.{setting}={value}"):
        check_hygiene(HygieneConfig(**{setting: value}))


def test_at_least_one_offender_is_named() -> None:
    with pytest.raises(UserError, match=r"hygiene\.offenders=0"):
        check_hygiene(HygieneConfig(offenders=0))


def _two_groups() -> Folder:
    groups = [
        [
            clean_attempt(g, s, [(3, 2)], float(s), {"id": f"t{g}", "question": f"{g}?"})
            for s in range(2)
        ]
        for g in range(2)
    ]
    return Folder(groups, [{"id": "h", "question": "held out?"}])
