"""Arrow streams of spans from somebody who is not trusted."""

import json
import pickle
import random
import time
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_support import arrow_stream

from lightning_ray.spans import SPAN_SCHEMA
from lightning_ray.spans.bulk import depths, read_bulk
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.otlp import TooMuchError, UndecodableError

LIMITS = TelemetryLimits(max_spans=50, max_value_bytes=200, max_depth=3)
PLACE = ("run", "r", "r/1")


def table(rows: int = 3, **columns: Any) -> pa.Table:
    """Tool calls, with further columns: a value for all rows, or a column."""
    given = {
        "span_id": [f"{number + 1:016x}" for number in range(rows)],
        "kind": "tool_call",
        "name": "search",
        **columns,
    }
    made = {}
    for name, value in given.items():
        ready = isinstance(value, list | pa.Array)
        made[name] = value if ready else pa.array([value] * rows)
    return pa.table({name: value for name, value in made.items() if value is not None})


def read(made: pa.Table) -> tuple[pa.RecordBatch, dict[str, int]]:
    batch, refused = read_bulk(arrow_stream(made), LIMITS, PLACE, "agent")
    batch.validate(full=True)
    assert batch.schema.equals(SPAN_SCHEMA)
    return batch, dict(refused)


def test_rows_go_where_the_door_says_and_what_they_say_else_is_kept() -> None:
    now = time.time_ns()
    made = table(
        2,
        name=pa.array(["search", "http://u:pw@h/"], pa.large_string()),
        trace_id="a" * 32,
        start_ns=[now - 5, None],
        end_ns=[now, None],
        input_tokens=pa.array([3, None], pa.int32()),
        attributes=['{"a": [1, {"authorization": "Bearer 0123456789"}]}', None],
        run_id="other",
        rollout_id="other",
        attempt_id="other/1",
        sequence=77,
        source="grader",
    )
    batch, refused = read(made)
    assert refused == {}
    for column, value in zip(("run_id", "rollout_id", "attempt_id"), PLACE, strict=True):
        assert set(batch[column].to_pylist()) == {value}
    assert batch["source"].to_pylist() == ["agent", "agent"]
    assert batch["sequence"].to_pylist() == [0, 0]
    assert batch["name"].to_pylist() == ["search", "http://u:***@h/"]
    assert batch["start_ns"].to_pylist()[0] == now - 5
    assert all(abs(at - now) < 60e9 for at in batch["end_ns"].to_pylist())
    assert batch["status"].to_pylist() == ["ok", "ok"]
    assert batch["input_tokens"].to_pylist() == [3, None]
    assert json.loads(batch["attributes"][0].as_py()) == {"a": [1, {"authorization": "***"}]}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"kind": "model_call"}, "kind is none of"),
        ({"kind": "resource"}, "kind is none of"),
        ({"policy": "mine"}, "only an engine"),
        ({"version": pa.array([1, 1, 1], pa.int32())}, "only an engine"),
        ({"token_ids": pa.array([[1]] * 3, pa.list_(pa.int32()))}, "only an engine"),
        ({"logprobs": pa.array([[0.0]] * 3, pa.list_(pa.float32()))}, "only an engine"),
        ({"versions": pa.array([[1]] * 3, pa.list_(pa.int32()))}, "only an engine"),
        ({"finish_reason": "stop"}, "only an engine"),
        ({"span_id": "x"}, "span_id is not"),
        ({"span_id": "0" * 16}, "span_id is not"),
        ({"trace_id": "A" * 32}, "trace_id is not"),
        ({"parent_span_id": ""}, "parent_span_id is not"),
        ({"status": "fine"}, "status is none"),
        ({"name": ""}, "name is empty"),
        ({"name": "n" * 201}, "more than 200 bytes"),
        ({"start_ns": 0, "end_ns": 5}, "times"),
        ({"end_ns": 2**62}, "times"),
        ({"kind": "reward"}, "finite value"),
        ({"kind": "reward", "value": float("nan")}, "finite value"),
        ({"value": 1.0}, "finite value"),
        ({"step": -1}, "step is not"),
        ({"cost_usd": float("inf")}, "cost_usd is not"),
        ({"attributes": "{"}, "no JSON"),
        ({"attributes": "[]"}, "no JSON object"),
        ({"attributes": '{"cost_usd": "x"}'}, "which is a column"),
        ({"attributes": '{"a": [[[[1]]]]}'}, "nested deeper"),
        ({"attributes": "[" * 100_000}, "nested deeper"),
    ],
)
def test_what_a_row_may_not_say_is_refused(columns: dict[str, Any], reason: str) -> None:
    good = table(3, span_id=[f"{number + 9:016x}" for number in range(3)])
    bad = table(3, **columns)
    both = pa.concat_tables([good, bad], promote_options="default")
    if "start_ns" in columns or "end_ns" in columns:
        both = bad
    batch, refused = read(both)
    assert batch.num_rows == both.num_rows - 3
    ((why, count),) = refused.items()
    assert reason in why and count == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no Arrow stream"),
        (b"\xff\xff\xff\xff", "no whole Arrow"),
        (arrow_stream(table())[:400], "ends too early|no Arrow"),
        (arrow_stream(table(colour="red")), "'colour' is none of the span schema"),
        (arrow_stream(table().drop(["kind"])), "the column kind is missing"),
        (arrow_stream(table(name=[[1], [2], [3]])), "no Arrow stream of spans"),
        (
            arrow_stream(table(), options=pa.ipc.IpcWriteOptions(compression="zstd")),
            "compressed columns are not taken",
        ),
        (arrow_stream(table(name=pa.array(["a"] * 3).dictionary_encode())), "dictionaries"),
    ],
)
def test_what_is_no_stream_of_spans_is_refused_as_a_whole(body: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        read_bulk(body, LIMITS, PLACE, "agent")


def test_more_rows_than_allowed_are_refused_before_they_are_read() -> None:
    with pytest.raises(TooMuchError, match="more than 50 spans"):
        read_bulk(arrow_stream(table(51)), LIMITS, PLACE, "agent")
    assert read(table(0))[0].num_rows == 0


BODY = arrow_stream(table(3, attributes='{"a": 1}', value=pa.array([None] * 3, pa.float64())))


@settings(max_examples=150)
@given(st.randoms(use_true_random=False), st.binary(max_size=40))
def test_a_mutated_stream_is_refused_or_harmless(chance: random.Random, tail: bytes) -> None:
    changed = bytearray(BODY)
    for _ in range(chance.choice([1, 2, 8])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    for body in (bytes(changed), tail, BODY[: chance.randrange(len(BODY))] + tail):
        try:
            batch, _ = read_bulk(body, LIMITS, PLACE, "agent")
        except (UndecodableError, TooMuchError):
            continue
        batch.validate(full=True)


def _depth(value: Any) -> int:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(_depth, inner), default=0)
    return 0


NESTED = st.recursive(
    st.one_of(st.integers(), st.text('[]{}"\\a', max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text('{["', max_size=2), inner, max_size=2)
    ),
)


@settings(max_examples=50)
@given(st.lists(st.one_of(st.none(), NESTED), max_size=4))
def test_depth_is_measured_without_parsing(values: list[Any]) -> None:
    texts = [None if value is None else json.dumps(value) for value in values]
    found = depths(pa.array(texts, pa.string())).to_pylist()
    assert found == [_depth(value) for value in values]


def test_a_secret_in_one_text_makes_the_batch_no_larger_to_send() -> None:
    texts = [json.dumps({"n": "x" * 900, "number": number}) for number in range(40)]
    limits = TelemetryLimits(max_spans=50, max_depth=3)
    sizes = []
    for first in (texts[0], json.dumps({"url": "https://user:hidden@host/" + "x" * 875})):
        made = table(40, attributes=[first, *texts[1:]])
        batch, _ = read_bulk(arrow_stream(made), limits, PLACE, "agent")
        assert "hidden" not in batch["attributes"][0].as_py()
        sizes.append(len(pickle.dumps(batch)))
    assert sizes[1] < 1.1 * sizes[0]
