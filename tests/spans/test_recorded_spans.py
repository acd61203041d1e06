"""Model calls that somebody else's engine recorded, with their tokens."""

import random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_support import arrow_stream

from lightning_ray.spans import SPAN_SCHEMA
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.otlp import TooMuchError, UndecodableError
from lightning_ray.spans.recorded import read_recorded
from lightning_ray.trajectories import rebuild_trees

LIMITS = TelemetryLimits(max_spans=50, max_value_bytes=200, max_depth=3)
OWNER = "live-0a1b2c3d-"


def table(rows: int = 3, **columns: Any) -> pa.Table:
    """Model calls of one rollout, with further columns: a value for all rows, or a column."""
    given = {
        "span_id": [f"{number + 1:016x}" for number in range(rows)],
        "kind": "model_call",
        "name": "chat",
        "rollout_id": "mine",
        "policy": "helper",
        "version": 3,
        "token_ids": pa.array([[1, 2, 3, 4]] * rows, pa.list_(pa.int64())),
        "logprobs": pa.array([[-0.5, -1.0]] * rows, pa.list_(pa.float64())),
        "finish_reason": "stop",
        **columns,
    }
    made = {}
    for name, value in given.items():
        ready = isinstance(value, list | pa.Array)
        made[name] = value if ready else pa.array([value] * rows)
    return pa.table({name: value for name, value in made.items() if value is not None})


def read_bytes(body: bytes) -> tuple[pa.RecordBatch, dict[str, int]]:
    batch, refused = read_recorded(
        body, LIMITS, "run", "live-", OWNER, ["helper", "planner"], "service"
    )
    batch.validate(full=True)
    assert batch.schema.equals(SPAN_SCHEMA)
    return batch, dict(refused)


def read(made: pa.Table) -> tuple[pa.RecordBatch, dict[str, int]]:
    return read_bytes(arrow_stream(made))


def test_rollouts_are_the_senders_own_and_the_same_whenever_they_are_sent() -> None:
    rows = table(
        4,
        rollout_id=["mine", "mine", f"{OWNER}mine", "other"],
        attempt_id=[None, "mine/2", f"{OWNER}mine/12", "other/1"],
        run_id="somebody's",
        source="grader",
        sequence=9,
    )
    batch, refused = read(rows)
    assert refused == {}
    assert batch["rollout_id"].to_pylist() == [f"{OWNER}mine"] * 3 + [f"{OWNER}other"]
    assert batch["attempt_id"].to_pylist() == [
        f"{OWNER}mine/1",
        f"{OWNER}mine/2",
        f"{OWNER}mine/12",
        f"{OWNER}other/1",
    ]
    assert set(batch["run_id"].to_pylist()) == {"run"}
    assert set(batch["source"].to_pylist()) == {"service"}
    assert set(batch["sequence"].to_pylist()) == {0}
    again, _ = read(rows)
    assert again.select(["span_id", "attempt_id"]).equals(batch.select(["span_id", "attempt_id"]))
    assert read(table(2))[0]["attempt_id"].to_pylist() == [f"{OWNER}mine/1"] * 2


def lists(*values: Any, of: pa.DataType) -> pa.Array:
    return pa.array([*values], pa.list_(of))


def test_a_call_may_have_been_sampled_by_several_versions() -> None:
    versions = lists([3, 5], None, [3, 3], of=pa.int32())
    batch, refused = read(table(3, versions=versions))
    assert refused == {} and batch["versions"].equals(versions)


def test_the_tokens_of_a_conversation_come_out_exactly() -> None:
    turns = table(
        2,
        token_ids=pa.array([[1, 2, 3], [9, 8]], pa.list_(pa.int32())),
        logprobs=pa.array([[-0.5], [-0.25]], pa.list_(pa.float32())),
        continues=[None, f"{1:016x}"],
        prefix_tokens=pa.array([0, 3], pa.int32()),
    )
    batch, refused = read(turns)
    assert refused == {}
    stored = pa.Table.from_batches([batch]).set_column(
        SPAN_SCHEMA.get_field_index("sequence"), SPAN_SCHEMA.field("sequence"), [[1, 2]]
    )
    (tree,), inexact = rebuild_trees(stored)
    assert inexact == {}
    first, second = tree.calls
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([1, 2, 3], [1, 2, 3, 9, 8])
    assert tree.parents == (None, 0)
    assert (second.policy, second.version) == ("helper", 3)


def test_what_else_a_rollout_is_made_of_may_come_along() -> None:
    kinds = ["tool_call", "agent_step", "message", "reward", "feedback"]
    ours = ("policy", "version", "token_ids", "logprobs", "finish_reason")
    others = table(
        5,
        kind=kinds,
        value=pa.array([None, None, None, 0.5, None], pa.float64()),
        **dict.fromkeys(ours),
    )
    batch, refused = read(others)
    assert refused == {} and batch["kind"].to_pylist() == kinds


HIDDEN = pa.ListArray.from_arrays(
    pa.array([0, 2, 4, 6], pa.int32()),
    pa.array([7, 7, -1, -1, 7, 7], pa.int32()),
    mask=pa.array([False, True, False]),
)
"""The list that is null has values all the same."""


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        *(
            ({"versions": lists(*[versions] * 3, of=pa.int32())}, "versions is not one of at least")
            for versions in ([3], [3, 4, 4], [4, 4], [3, None], [3, -1], [])
        ),
        ({"rollout_id": None}, "rollout_id is not 1 to 128"),
        ({"rollout_id": ""}, "rollout_id is not 1 to 128"),
        ({"rollout_id": "r" * 129}, "rollout_id is not 1 to 128"),
        ({"rollout_id": "a/1"}, "rollout_id is not 1 to 128"),
        ({"rollout_id": "a\n"}, "rollout_id is not 1 to 128"),
        ({"rollout_id": "live-99999999-x"}, "no conversation of this key"),
        ({"attempt_id": "other/1"}, "attempt_id is not"),
        ({"attempt_id": "mine/0"}, "attempt_id is not"),
        ({"attempt_id": "mine/1/1"}, "attempt_id is not"),
        ({"attempt_id": "mine"}, "attempt_id is not"),
        ({"attempt_id": "mine/1000000"}, "attempt_id is not"),
        ({"kind": "resource"}, "kind is none of"),
        ({"kind": "tool_call"}, "only a model call has"),
        ({"policy": "nobody"}, "a policy that is served here: helper, planner"),
        ({"policy": None}, "a policy that is served here"),
        ({"version": None}, "a version of at least 0"),
        ({"version": -1}, "a version of at least 0"),
        ({"token_ids": None, "logprobs": None}, "token_ids has none"),
        ({"token_ids": lists([], [], [], of=pa.int32()), "logprobs": None}, "token_ids has none"),
        ({"token_ids": lists([5, -1], [-1, 5], [-1], of=pa.int32())}, "token_ids has none"),
        ({"token_ids": lists([None], [5, None], [None, 5], of=pa.int32())}, "token_ids has none"),
        ({"logprobs": lists([-1.0] * 5, [-1.0] * 6, [0.0] * 5, of=pa.float32())}, "logprobs has"),
        ({"logprobs": lists([0.1], [-1.0, 0.1], [9e9], of=pa.float32())}, "logprobs has"),
        ({"logprobs": lists([None], [-1.0, None], [None], of=pa.float32())}, "logprobs has"),
        (
            {"logprobs": lists([float("nan")], [float("-inf")], [-1e300], of=pa.float64())},
            "logprobs has",
        ),
        ({"continues": "a" * 15}, "continues and prefix_tokens"),
        ({"continues": "a" * 16}, "continues and prefix_tokens"),
        ({"continues": "a" * 16, "prefix_tokens": 0}, "continues and prefix_tokens"),
        ({"prefix_tokens": 1}, "continues and prefix_tokens"),
        ({"prefix_tokens": -1}, "continues and prefix_tokens"),
        ({"span_id": "x"}, "span_id is not"),
    ],
)
def test_what_a_row_may_not_say_is_refused(columns: dict[str, Any], reason: str) -> None:
    good = table(3, span_id=[f"{number + 9:016x}" for number in range(3)])
    types = pa.schema([(name, SPAN_SCHEMA.field(name).type) for name in good.schema.names])
    bad = table(3, **columns)
    both = pa.concat_tables([good.cast(types), bad], promote_options="permissive")
    batch, refused = read(both)
    assert batch["span_id"].to_pylist() == good["span_id"].to_pylist()
    ((why, count),) = refused.items()
    assert reason in why and count == 3


def test_a_null_list_with_values_is_judged_as_a_null_one() -> None:
    batch, refused = read(table(3, token_ids=HIDDEN, logprobs=None))
    assert batch["span_id"].to_pylist() == [f"{number:016x}" for number in (1, 3)]
    assert batch["token_ids"].to_pylist() == [[7, 7], [7, 7]]
    ((why, count),) = refused.items()
    assert "token_ids has none" in why and count == 1


def test_a_stream_that_is_none_is_refused_as_a_whole() -> None:
    with pytest.raises(UndecodableError, match="ends too early"):
        read_bytes(arrow_stream(table())[:600])
    with pytest.raises(UndecodableError, match="no Arrow stream of spans"):
        read(table(token_ids=lists([2**40], [1], [1], of=pa.int64())))
    with pytest.raises(TooMuchError, match="more than 50 spans"):
        read(table(51))
    assert read(table(0))[0].num_rows == 0


BODY = arrow_stream(table(3, continues="a" * 16, prefix_tokens=2, attempt_id="mine/2"))


@settings(max_examples=150)
@given(st.randoms(use_true_random=False))
def test_a_mutated_stream_is_refused_or_harmless(chance: random.Random) -> None:
    changed = bytearray(BODY)
    for _ in range(chance.choice([1, 2, 8])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    try:
        batch, _ = read_bytes(bytes(changed))
    except (UndecodableError, TooMuchError):
        return
    assert all(name.startswith(OWNER) for name in batch["rollout_id"].to_pylist())
    assert all(
        attempt.startswith(f"{rollout}/")
        for rollout, attempt in zip(
            batch["rollout_id"].to_pylist(), batch["attempt_id"].to_pylist(), strict=True
        )
    )
