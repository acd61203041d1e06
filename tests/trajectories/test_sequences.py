"""From spans to the table that a learner trains on."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_token_trees import call, stored_attempts, table

from lightning_ray.spans import SpanKind, span
from lightning_ray.spans.schema import ATTEMPT_SPAN
from lightning_ray.trajectories import (
    SEQUENCE_SCHEMA,
    build_sequences,
    rebuild_trees,
    trainable_counts,
    with_advantages,
)

LIST_COLUMNS = ["token_ids", "trainable", "logprobs", "versions", "calls", "advantages"]


def build(rows: list[dict[str, object]], **options: object):
    return build_sequences(table(rows), {"r0/0": "g0"}, "main", **options)


def test_a_conversation_is_one_sequence_with_every_answer_trainable():
    sequences, report = build(
        [
            call("a", [1, 2, 3, 4], 2, version=7),
            call("b", [5, 6], 1, continues="a", prefix_tokens=4, sequence=1, version=8),
        ]
    )
    assert sequences.schema == SEQUENCE_SCHEMA
    (row,) = sequences.to_pylist()
    assert row["token_ids"] == [1, 2, 3, 4, 5, 6]
    assert row["trainable"] == [False, False, True, True, False, True]
    assert row["logprobs"] == [0, 0, -0.5, -0.5, 0, -0.5]
    assert row["versions"] == [-1, -1, 7, 7, -1, 8]
    assert row["calls"] == [-1, -1, 0, 0, -1, 1]
    assert (row["group_id"], row["rollout_id"], row["attempt_id"]) == ("g0", "r0", "r0/0")
    assert (report.attempts, report.calls, report.sequences, report.trainable_tokens) == (
        1,
        2,
        1,
        3,
    )


def test_a_call_that_went_on_while_the_weights_changed_has_a_version_for_each_token():
    rows = [
        call("a", [1, 2, 3, 4], 3, version=7, versions=[7, 8, 8]),
        call("b", [5, 6], 1, continues="a", prefix_tokens=4, sequence=1, version=9),
    ]
    sequences, _ = build(rows)
    assert sequences["versions"].to_pylist() == [[-1, 7, 8, 8, -1, 9]]
    _, report = build([{**rows[0], "versions": [7, 8]}])
    assert "does not say of each token which version" in report.inexact["r0/0"]


def test_parallel_continuations_share_history_but_not_its_credit():
    sequences, _ = build(
        [
            call("a", [1, 2], 1),
            call("b", [3], 1, continues="a", prefix_tokens=2, sequence=1),
            call("c", [4], 1, continues="a", prefix_tokens=2, sequence=2),
        ]
    )
    first, second = sequences.to_pylist()
    assert first["token_ids"] == [1, 2, 3] and first["trainable"] == [False, True, True]
    assert second["token_ids"] == [1, 2, 4] and second["trainable"] == [False, False, True]


def test_other_policies_are_observation():
    sequences, _ = build(
        [
            call("a", [1, 2], 1, policy="frozen", version=None),
            call("b", [3], 1, continues="a", prefix_tokens=2, sequence=1),
        ]
    )
    assert sequences["trainable"].to_pylist() == [[False, False, True]]


def test_an_aborted_call_is_learnt_from_only_when_asked():
    rows = [call("a", [1, 2], 1, status="aborted")]
    sequences, report = build(rows)
    assert sequences.num_rows == 0 and report.empty == ("r0/0",)
    sequences, report = build(rows, train_aborted=True)
    assert sequences["trainable"].to_pylist() == [[False, True]] and report.empty == ()


def test_what_is_left_out_is_counted():
    rows = [
        call("a", [1, 2], 1),
        call("b", [4], 1, attempt_id="r1/0", continues="gone", prefix_tokens=1),
        call("c", [1, 2], 1, attempt_id="r2/0", policy="frozen"),
        call("d", [1, 2], 1, attempt_id="r3/0", version=None),
        call("e", [1, 2], 1, attempt_id="not asked for"),
    ]
    groups = {f"r{index}/0": "g" for index in range(5)}
    sequences, report = build_sequences(table(rows), groups, "main")
    assert sequences["attempt_id"].to_pylist() == ["r0/0"]
    assert report.attempts == 5
    assert set(report.inexact) == {"r1/0", "r3/0"}
    assert report.empty == ("r2/0", "r4/0")


def test_credit_reaches_the_trainable_tokens_only():
    sequences, _ = build_sequences(
        table([call("a", [1, 2, 3], 2), call("b", [4, 5], 1, attempt_id="r1/0")]),
        {"r0/0": "g", "r1/0": "g"},
        "main",
    )
    credited = with_advantages(sequences, {"r0/0": np.array([0.25, -1.0]), "r1/0": 2.0})
    assert credited["advantages"].to_pylist() == [[0.0, 0.25, -1.0], [0.0, 2.0]]
    assert credited.schema == SEQUENCE_SCHEMA
    assert credited.drop(["advantages"]).equals(sequences.drop(["advantages"]))


def test_credit_that_does_not_fit_is_refused():
    sequences, _ = build([call("a", [1, 2, 3], 2)])
    for credit in ({}, {"r0/0": np.zeros(3)}, {"r0/0": float("nan")}, {"r0/0": np.zeros((2, 1))}):
        with pytest.raises(ValueError, match="r0/0"):
            with_advantages(sequences, credit)


@settings(max_examples=150, deadline=None)
@given(stored_attempts(), stored_attempts(), st.data())
def test_every_sampled_token_is_trainable_in_exactly_one_place(first, second, data):
    rows = [*first[0], *(row | {"attempt_id": "r1/0", "rollout_id": "r1"} for row in second[0])]
    for row in rows:
        row["policy"] = data.draw(st.sampled_from(["main", "other"]))
        # A value that says which sampled token of which call this is.
        row["logprobs"] = [
            -float(data.draw(st.integers(1, 10**6))) for _ in range(len(row["logprobs"]))
        ]
    spans = table(rows)
    sequences, report = build_sequences(spans, {"r0/0": "g", "r1/0": "g"}, "main")
    lengths = {name: [len(x) for x in sequences[name].to_pylist()] for name in LIST_COLUMNS}
    assert all(lengths[name] == lengths["token_ids"] for name in LIST_COLUMNS)
    trees, _ = rebuild_trees(spans)
    recorded = sorted(
        (tree.attempt_id, float(logprob), int(token))
        for tree in trees
        for one in tree.calls
        if one.policy == "main"
        for logprob, token in zip(one.logprobs, one.tokens[one.prompt_length :], strict=True)
    )
    learnt: list[tuple[str, float, int]] = []
    whole = {(tree.attempt_id, one.tokens.tobytes()) for tree in trees for one in tree.calls}
    for row in sequences.to_pylist():
        tokens = np.array(row["token_ids"], np.int32)
        assert (row["attempt_id"], tokens.tobytes()) in whole
        for token, trainable, logprob, version in zip(
            tokens, row["trainable"], row["logprobs"], row["versions"], strict=True
        ):
            if trainable:
                learnt.append((row["attempt_id"], logprob, int(token)))
            else:
                assert logprob == 0 and version == -1
    assert sorted(learnt) == recorded
    assert report.trainable_tokens == len(recorded)
    assert sum(trainable_counts(sequences).values()) == len(recorded)


@settings(max_examples=50, deadline=None)
@given(stored_attempts(), st.data())
def test_per_token_credit_keeps_its_order_in_any_slice(attempt, data):
    sequences, _ = build(attempt[0])
    counts = trainable_counts(sequences)
    credit = {name: np.arange(1, count + 1, dtype=np.float64) for name, count in counts.items()}
    credited = with_advantages(sequences, credit)
    values = [x for row in credited["advantages"].to_pylist() for x in row if x]
    assert values == list(range(1, sum(counts.values()) + 1))
    # A slice of a larger table is a table like any other.
    doubled = pa.concat_tables([credited, credited]).slice(credited.num_rows)
    assert with_advantages(doubled, credit).equals(credited)


def test_what_was_sampled_after_the_attempts_end_is_not_learnt_from():
    place = {"run_id": "run", "rollout_id": "r0", "attempt_id": "r0/0"}
    end = {**span(SpanKind.RESOURCE, ATTEMPT_SPAN, **place), "sequence": 3}
    late = call("b", [5, 6], 1, continues="a", prefix_tokens=4, sequence=4, version=8)
    rows = [call("a", [1, 2, 3, 4], 2, version=7, sequence=1), end, late]
    sequences, report = build(rows)
    (row,) = sequences.to_pylist()
    assert row["trainable"] == [False, False, True, True, False, False]
    assert report.inexact == {} and report.trainable_tokens == 2
    sequences, _ = build([rows[0], {**late, "sequence": 2}, end])
    assert sum(sequences.to_pylist()[0]["trainable"]) == 3
