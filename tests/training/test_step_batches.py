import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lightning_ray.algorithms import AlgorithmConfig, LossConfig, make_algorithm
from lightning_ray.algorithms.config import KlConfig, OverlongConfig
from lightning_ray.errors import UserError
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
)
from lightning_ray.spans import SPAN_SCHEMA, SpanKind, SpanStatus, span, to_batch
from lightning_ray.training.batches import Batch, make_batch, mean_rewards
from lightning_ray.trajectories import (
    Check,
    HygieneConfig,
    HygienePolicy,
    task_keys,
)
from lightning_ray.trajectories.batch import SEQUENCE_SCHEMA

ALGORITHM = make_algorithm(AlgorithmConfig(normalize="none"))


def record(
    rollout_id: str, group_id: str, reward: float | None, attempts: int = 1, **rewards: float
) -> RolloutRecord:
    """A rollout whose last attempt was worth `reward`, or came to none."""
    good = reward is not None
    statuses = [AttemptStatus.FAILED] * (attempts - 1)
    statuses += [AttemptStatus.SUCCEEDED if good else AttemptStatus.TIMED_OUT]
    return RolloutRecord(
        RolloutSpec(rollout_id, "task", {}, 1.0, group_id=group_id),
        RolloutStatus.SUCCEEDED if good else RolloutStatus.FAILED,
        tuple((f"{rollout_id}/{n}", status) for n, status in enumerate(statuses, start=1)),
        AttemptOutcome(statuses[-1], {"reward": reward, **rewards} if good else {}),
    )


def calls(attempt_id: str, *sampled: list[int], version: int = 3, **columns: Any) -> list[dict]:
    """Calls of an attempt, each with a prompt of its own that nothing continues."""
    rows = []
    for sequence, tokens in enumerate(sampled, start=1):
        given = {
            "policy": "policy",
            "version": version,
            "token_ids": [99 + sequence, 200, *tokens],
            "logprobs": [-0.1] * len(tokens),
            **columns,
        }
        made = span(
            SpanKind.MODEL_CALL,
            "/v1/chat/completions",
            run_id="run",
            rollout_id=attempt_id.rpartition("/")[0],
            attempt_id=attempt_id,
            **given,
        )
        rows.append({**made, "sequence": sequence})
    return rows


def ends(records: list[RolloutRecord]) -> list[dict]:
    """What the worker stores at the end of each rollout's latest attempt."""
    rows = []
    for record in records:
        if not record.attempts or record.outcome is None:
            continue
        place = {
            "run_id": "run",
            "rollout_id": record.spec.rollout_id,
            "attempt_id": record.attempt_id,
        }
        good = record.outcome.status is AttemptStatus.SUCCEEDED
        rows.append(
            span(
                SpanKind.RESOURCE,
                "attempt",
                **place,
                status=SpanStatus.OK if good else SpanStatus.ERROR,
                attributes={"status": record.outcome.status.value, "error": record.outcome.error},
            )
        )
        for name, value in record.outcome.rewards.items():
            rows.append(span(SpanKind.REWARD, name, **place, value=value))
    return rows


def batch_of(
    records: list[RolloutRecord],
    rows: list[dict],
    heldout: dict[str, str] | None = None,
    **settings: Any,
) -> tuple[list[dict], Batch]:
    rows = rows + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)]) if rows else SPAN_SCHEMA.empty_table()
    config = replace(HygieneConfig(), **settings)
    sequences, batch = make_batch(records, spans, ALGORITHM, "policy", config, heldout)
    assert sequences.schema.equals(SEQUENCE_SCHEMA) and sequences.num_rows == batch.rows
    return sequences.to_pylist(), batch


def test_attempts_are_credited_against_their_own_group_and_learnt_from() -> None:
    rows = calls("a/1", [1]) + calls("b/1", [2, 3]) + calls("c/1", [4], [5]) + calls("d/1", [6])
    records = [
        record("a", "g1", 1.0),
        record("b", "g1", 0.0),
        record("c", "g2", 0.5),
        record("d", "g2", 0.1),
    ]
    sequences, batch = batch_of(records, rows)
    assert batch.advantages == pytest.approx({"a/1": 0.5, "b/1": -0.5, "c/1": 0.2, "d/1": -0.2})
    assert [(row["attempt_id"], row["group_id"]) for row in sequences] == [
        ("a/1", "g1"),
        ("b/1", "g1"),
        ("c/1", "g2"),
        ("c/1", "g2"),
        ("d/1", "g2"),
    ]
    assert sequences[1]["token_ids"] == [100, 200, 2, 3]
    assert sequences[1]["advantages"] == [0.0, 0.0, -0.5, -0.5]
    assert sequences[1]["versions"] == [-1, -1, 3, 3]
    assert (batch.used_groups, batch.flat_groups, batch.left_out) == (2, 0, 0)
    assert batch.report.trainable_tokens == 6


def test_a_failed_rollout_is_left_out_and_not_worth_zero() -> None:
    rows = calls("a/1", [1]) + calls("b/1", [2]) + calls("c/1", [3])
    records = [record("a", "g", 1.0), record("b", "g", 0.5), record("c", "g", None)]
    sequences, batch = batch_of(records, rows)
    # With a zero for the third the mean would be 0.5, and the second have no credit.
    assert batch.advantages == pytest.approx({"a/1": 0.25, "b/1": -0.25})
    assert {row["rollout_id"] for row in sequences} == {"a", "b"}
    assert batch.left_out == 1 and batch.rewards == {"reward": 0.75}


def test_only_the_attempt_that_decided_a_rollout_is_learnt_from() -> None:
    rows = calls("a/1", [1]) + calls("a/2", [2]) + calls("b/1", [3])
    sequences, batch = batch_of([record("a", "g", 1.0, attempts=2), record("b", "g", 0.0)], rows)
    assert {row["attempt_id"] for row in sequences} == {"a/2", "b/1"}
    assert set(batch.advantages) == {"a/2", "b/1"} and batch.left_out == 0


@pytest.mark.parametrize(
    "records",
    [
        [record("a", "g", 0.5), record("b", "g", 0.5)],
        [record("a", "g", 0.5), record("b", "g", None)],
        [record("a", "g", 0.5)],
    ],
)
def test_a_group_without_contrast_teaches_nothing(records: list[RolloutRecord]) -> None:
    rows = calls("a/1", [1]) + calls("b/1", [2]) + calls("x/1", [3]) + calls("y/1", [4], version=2)
    sequences, batch = batch_of(records, rows)
    assert sequences == [] and batch.rows == 0 and batch.advantages == {}
    assert (batch.used_groups, batch.flat_groups) == (0, 1)
    assert batch.oldest_version is None and batch.rewards == {"reward": 0.5}
    other = [record("x", "h", 1.0), record("y", "h", 0.0)]
    sequences, batch = batch_of(records + other, rows)
    assert {row["group_id"] for row in sequences} == {"h"}
    assert (batch.used_groups, batch.flat_groups, batch.oldest_version) == (1, 1, 2)


@pytest.mark.parametrize(
    ("credit", "says"),
    [([0.0], "one number per attempt"), ([0.0, math.nan], "finite"), ("x", "could not convert")],
)
def test_credit_that_cannot_be_used_stops_the_step(credit: Any, says: str) -> None:
    class Own:
        loss = LossConfig()

        def score_group(self, group: Any) -> Any:
            return credit

    records = [record("a", "g", 1.0), record("b", "g", 0.0)]
    rows = calls("a/1", [1]) + calls("b/1", [2]) + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)])
    with pytest.raises(UserError, match=rf"algorithm.name=own:Own: score_group .*{says}"):
        make_batch(records, spans, Own(), "policy", settings=AlgorithmConfig(name="own:Own"))


def test_an_algorithm_may_learn_from_a_group_whose_attempts_are_all_good() -> None:
    class Imitate:
        loss = LossConfig(kind="cross_entropy")

        def score_group(self, group: Any) -> Any:
            return (group.rewards >= 1.0).astype(float)

    records = [record("a", "g", 1.0), record("b", "g", 1.0), record("c", "h", 0.0)]
    rows = calls("a/1", [1]) + calls("b/1", [2]) + calls("c/1", [3]) + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)])
    kept = HygieneConfig(constant_groups=HygienePolicy.off)
    _, batch = make_batch(
        records, spans, Imitate(), "policy", kept, settings=AlgorithmConfig(name="own:Imitate")
    )
    assert batch.advantages == {"a/1": 1.0, "b/1": 1.0}
    assert (batch.used_groups, batch.flat_groups) == (1, 1)


def test_an_attempt_without_exact_tokens_is_left_out() -> None:
    broken = calls("b/1", [2], continues="lost", prefix_tokens=4)
    foreign = calls("c/1", [3], policy="another")
    records = [record(name, "g", reward) for name, reward in [("a", 1.0), ("b", 0.0), ("c", 0.3)]]
    records += [record("d", "g", 0.9), record("e", "g", 0.8)]
    _, batch = batch_of(records, calls("a/1", [1]) + broken + foreign + calls("e/1", [5]))
    assert set(batch.advantages) == {"a/1", "e/1"} and batch.left_out == 3
    assert set(batch.report.inexact) == {"b/1"}
    # What they were worth is known all the same.
    assert batch.rewards["reward"] == pytest.approx(np.mean([1.0, 0.0, 0.3, 0.9, 0.8]))


def test_a_step_of_which_nothing_came_is_an_empty_batch() -> None:
    cancelled = RolloutRecord(
        RolloutSpec("q", "task", {}, 1.0, group_id="g"), RolloutStatus.CANCELLED, (), None
    )
    sequences, batch = batch_of([record("a", "g", None), cancelled], [])
    assert (sequences, batch.rows, batch.left_out, batch.rewards) == ([], 0, 2, {})
    assert batch.oldest_version is None


def test_named_rewards_are_averaged_over_those_that_have_them() -> None:
    records = [
        record("a", "g", 1.0, exact=1.0),
        record("b", "g", 0.0, exact=0.0, style=0.2),
        record("c", "g", None),
    ]
    assert mean_rewards(records) == pytest.approx({"reward": 0.5, "exact": 0.5, "style": 0.2})


def one_of_each() -> tuple[list[RolloutRecord], list[dict]]:
    """A group of two good attempts and one with a defect of each attempt-level check."""
    good = [record("a", "g", 1.0), record("b", "g", 0.0)]
    bad = [record(name, "g", 0.5) for name in ("inexact", "empty", "cut", "contradictory")]
    bad[3] = replace(bad[3], outcome=replace(bad[3].outcome, error="grader: KeyError"))
    rows = calls("a/1", [1]) + calls("b/1", [2]) + calls("contradictory/1", [5])
    rows += calls("inexact/1", [3], logprobs=[float("nan")])
    rows += calls("cut/1", [4], finish_reason="length")
    first = record("crashed", "g", None)
    failed = AttemptOutcome(AttemptStatus.FAILED, error="exit code 3")
    rows += ends([replace(first, outcome=failed)])
    return [*good, *bad, record("crashed", "g", None, attempts=2)], rows


def test_what_the_policies_drop_is_gone_before_credit_is_computed() -> None:
    records, rows = one_of_each()
    sequences, batch = batch_of(records, rows)
    assert {row["rollout_id"] for row in sequences} == {"a", "b", "cut"}
    # The mean of 1, 0 and 0.5: nothing that was dropped moves it.
    assert batch.advantages == pytest.approx({"a/1": 0.5, "b/1": -0.5, "cut/1": 0.0})
    assert batch.left_out == 4 and batch.flat_groups == 0
    counts = {check.value: count for check, count in batch.hygiene.counts.items() if count}
    assert counts == {
        "inexact_tokens": 1,
        "empty_traces": 1,
        "cut_traces": 1,
        "contradictory_rewards": 1,
        # The retried attempt and the last one.
        "infrastructure_faults": 2,
    }
    assert batch.hygiene.why_stopped("in step 1") is None
    faults = batch.hygiene.offenders[Check.INFRASTRUCTURE_FAULTS]
    assert [(fault.attempts, fault.reason) for fault in faults] == [
        (("crashed/1",), "failed: exit code 3"),
        (("crashed/2",), "timed_out"),
    ]


def test_dropping_more_and_warning_of_more() -> None:
    records, rows = one_of_each()
    _, batch = batch_of(records, rows, cut_traces=HygienePolicy.drop)
    assert set(batch.advantages) == {"a/1", "b/1"} and batch.left_out == 5
    _, batch = batch_of(records, rows, contradictory_rewards=HygienePolicy.warn)
    assert set(batch.advantages) == {"a/1", "b/1", "cut/1", "contradictory/1"}
    _, batch = batch_of(records, rows, empty_traces=HygienePolicy.warn)
    # Kept, and without a token to learn from all the same.
    assert set(batch.advantages) == {"a/1", "b/1", "cut/1"} and batch.left_out == 4
    _, batch = batch_of(records, rows, cut_traces=HygienePolicy.off)
    assert "hygiene_cut_traces" not in batch.hygiene.metrics()


@pytest.mark.parametrize(
    "check", ["inexact_tokens", "empty_traces", "cut_traces", "infrastructure_faults"]
)
def test_a_check_that_says_to_stop_names_itself_and_the_first_offender(check: str) -> None:
    records, rows = one_of_each()
    _, batch = batch_of(records, rows, **{check: HygienePolicy.stop})
    reason = batch.hygiene.why_stopped("in step 7")
    assert reason is not None and len(reason.splitlines()) == 1
    first = batch.hygiene.offenders[Check(check)][0]
    for part in (f"hygiene.{check}=stop", "in step 7", first.attempts[0], f"hygiene.{check}=drop"):
        assert part in reason


def test_a_rollout_at_a_held_out_task_stops_the_run_or_is_left_out() -> None:
    records = [record("a", "g", 1.0), record("b", "g", 0.0)]
    leak = [record("c", "h", 1.0), record("d", "h", 0.0)]
    leak = [replace(r, spec=replace(r.spec, task={"q": "What is  2 PLUS 2?"})) for r in leak]
    heldout = task_keys([("held-1", {"id": "held-1", "q": "what is 2 plus 2?"})])
    rows = [row for n, name in enumerate("abcd") for row in calls(f"{name}/1", [n])]
    _, batch = batch_of(records + leak, rows, heldout)
    assert batch.hygiene.counts[Check.LEAKAGE] == 2
    reason = batch.hygiene.why_stopped("in step 1")
    assert reason is not None and "is the held-out task held-1" in reason
    _, batch = batch_of(records + leak, rows, heldout, leakage=HygienePolicy.drop)
    assert set(batch.advantages) == {"a/1", "b/1"} and batch.left_out == 2
    assert batch.hygiene.why_stopped("in step 1") is None
    _, batch = batch_of(records, rows)
    assert Check.LEAKAGE not in batch.hygiene.counts


def test_constant_groups_may_be_kept() -> None:
    records = [record("a", "g", 0.5), record("b", "g", 0.5)]
    rows = calls("a/1", [1]) + calls("b/1", [2])
    _, batch = batch_of(records, rows, constant_groups=HygienePolicy.warn)
    # The algorithm is asked, and gives none; see the one that imitates, which does.
    assert (batch.used_groups, batch.flat_groups, batch.rows) == (0, 1, 0)
    assert batch.hygiene.dropped == {}
    assert batch.hygiene.counts[Check.CONSTANT_BATCHES] == 1


def test_a_small_group_is_left_out_and_counted() -> None:
    records = [record("a", "g", 1.0), record("b", "g", 0.0), record("c", "h", 1.0)]
    records += [record("d", "h", None), record("e", "i", 1.0), record("f", "i", 0.0)]
    records += [record("h", "i", 0.5)]
    rows = [row for n, name in enumerate("abcdefh") for row in calls(f"{name}/1", [n])] + ends(
        records
    )
    spans = pa.Table.from_batches([to_batch(rows)])
    for fewest, used, small in ((1, 2, 0), (2, 2, 1), (3, 1, 2)):
        settings = AlgorithmConfig(min_group=fewest)
        _, batch = make_batch(records, spans, ALGORITHM, "policy", settings=settings)
        assert (batch.used_groups, batch.small_groups) == (used, small)
        assert batch.flat_groups == 3 - used - small and batch.left_out == 1


def test_a_batch_as_the_baseline_needs_no_contrast_within_a_group() -> None:
    loss = LossConfig(kl=KlConfig(place="reward", whiten=True))
    settings = AlgorithmConfig(name="reinforce_pp", normalize="batch", loss=loss)
    algorithm = make_algorithm(settings)
    records = [record("a", "g", 1.0), record("b", "g", 1.0), record("c", "h", 0.0)]
    rows = calls("a/1", [1]) + calls("b/1", [2]) + calls("c/1", [3]) + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)])
    _, batch = make_batch(records, spans, algorithm, "policy", settings=settings)
    assert (batch.used_groups, batch.flat_groups) == (2, 0)
    assert batch.advantages["a/1"] == batch.advantages["b/1"] > 0 > batch.advantages["c/1"]
    # What is equal throughout the step teaches nothing here either.
    _, batch = make_batch(records[:2], spans, algorithm, "policy", settings=settings)
    assert batch.rows == 0


def test_answers_that_are_too_long_lose_credit() -> None:
    settings = AlgorithmConfig(overlong=OverlongConfig(max_tokens=3, buffer=2))
    records = [record(name, "g", reward) for name, reward in (("a", 1.0), ("b", 1.0), ("c", 0.0))]
    rows = calls("a/1", [1]) + calls("b/1", [2, 2, 2]) + calls("c/1", [3]) + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)])
    _, batch = make_batch(records, spans, ALGORITHM, "policy", settings=settings)
    assert batch.advantages["a/1"] > batch.advantages["b/1"] == batch.advantages["c/1"]
    assert batch.rewards["reward"] == pytest.approx(2 / 3)


def test_a_repeated_span_is_learnt_from_once() -> None:
    records = [record("a", "g", 1.0), record("b", "g", 0.0)]
    once = calls("a/1", [1, 2]) + calls("b/1", [3])
    sequences, batch = batch_of(records, [*once, once[0]])
    assert batch.report.trainable_tokens == 3 and len(sequences) == 2
    assert batch.hygiene.counts[Check.DUPLICATE_SPANS] == 1


def test_a_reward_that_is_not_the_one_in_the_spans_is_contradictory() -> None:
    records = [record(name, "g", reward) for name, reward in (("a", 1.0), ("b", 0.0), ("c", 0.5))]
    rows = [row for n, name in enumerate("abc") for row in calls(f"{name}/1", [n])]
    rows += [row for row in ends([record("c", "g", 0.25)]) if row["kind"] == "reward"]
    rows += [row for row in ends([record("b", "g", 0.0)]) if row["kind"] == "reward"]
    _, batch = batch_of(records, rows)
    assert set(batch.advantages) == {"a/1", "b/1"}
    (found,) = batch.hygiene.offenders[Check.CONTRADICTORY_REWARDS]
    assert found.attempts == ("c/1",)


def test_an_attempt_with_nothing_to_learn_gives_its_group_no_contrast() -> None:
    rows = calls("a/1", [1]) + calls("b/1", [2], policy="another")
    sequences, batch = batch_of([record("a", "g", 1.0), record("b", "g", 0.0)], rows)
    assert sequences == [] and (batch.used_groups, batch.flat_groups) == (0, 1)
