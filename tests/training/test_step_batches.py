import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lightning_ray.algorithms import AlgorithmConfig, LossConfig, make_algorithm
from lightning_ray.errors import UserError
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
)
from lightning_ray.spans import SPAN_SCHEMA, SpanKind, span, to_batch
from lightning_ray.training.batches import Batch, make_batch, mean_rewards
from lightning_ray.trajectories.batch import SEQUENCE_SCHEMA

ALGORITHM = make_algorithm(AlgorithmConfig(normalize_by_std=False))


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


def batch_of(records: list[RolloutRecord], rows: list[dict]) -> tuple[list[dict], Batch]:
    spans = pa.Table.from_batches([to_batch(rows)]) if rows else SPAN_SCHEMA.empty_table()
    sequences, batch = make_batch(records, spans, ALGORITHM, "policy")
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
    spans = pa.Table.from_batches([to_batch(calls("a/1", [1]) + calls("b/1", [2]))])
    with pytest.raises(UserError, match=rf"algorithm.name=own:Own: score_group .*{says}"):
        make_batch(records, spans, Own(), "policy", "own:Own")


def test_an_algorithm_may_learn_from_a_group_whose_attempts_are_all_good() -> None:
    class Imitate:
        loss = LossConfig(kind="cross_entropy")

        def score_group(self, group: Any) -> Any:
            return (group.rewards >= 1.0).astype(float)

    records = [record("a", "g", 1.0), record("b", "g", 1.0), record("c", "h", 0.0)]
    rows = calls("a/1", [1]) + calls("b/1", [2]) + calls("c/1", [3])
    spans = pa.Table.from_batches([to_batch(rows)])
    _, batch = make_batch(records, spans, Imitate(), "policy", "own:Imitate")
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
