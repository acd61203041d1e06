import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spans_support import row

from lightning_ray.spans import SPAN_SCHEMA, SpanKind, SpanStatus, span, to_batch

INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ROWS = st.fixed_dictionaries(
    {
        "token_ids": st.none() | st.lists(INT32, max_size=8),
        "logprobs": st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=8),
        "version": st.none() | INT32,
        "versions": st.none() | st.lists(INT32, max_size=8),
        "prefix_tokens": st.none() | st.integers(0, 2**31 - 1),
        "continues": st.none() | TEXT,
        "finish_reason": st.none() | TEXT,
        "value": st.none() | st.floats(allow_nan=False),
        "agent": st.none() | TEXT,
    }
)


@given(st.lists(ROWS, max_size=5))
def test_what_goes_into_a_batch_comes_out_of_its_ipc_bytes(columns: list[dict[str, Any]]) -> None:
    rows = [row(f"{place:016x}", **one) for place, one in enumerate(columns)]
    batch = to_batch(rows)
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, SPAN_SCHEMA) as writer:
        writer.write_batch(batch)
    read = pa.ipc.open_stream(stream.getvalue()).read_all()
    assert read.schema.equals(SPAN_SCHEMA, check_metadata=True)
    found = read.to_pylist()
    assert [
        {name: one[name] for name in given} for one, given in zip(found, rows, strict=True)
    ] == (rows)


def test_a_span_is_given_an_id_times_and_its_attributes_as_json() -> None:
    made = span(
        SpanKind.REWARD,
        "exact",
        run_id="run",
        rollout_id="r",
        attempt_id="r/1",
        status=SpanStatus.ERROR,
        attributes={"why": "ü"},
    )
    (read,) = to_batch([made]).to_pylist()
    assert len(read["span_id"]) == 16 and read["start_ns"] == read["end_ns"] > 0
    assert (read["kind"], read["status"]) == ("reward", "error")
    assert json.loads(read["attributes"]) == {"why": "ü"}
    assert read["token_ids"] is None


def test_a_column_that_the_schema_lacks_is_refused() -> None:
    with pytest.raises(KeyError, match="no column 'tokens'"):
        row("a", tokens=[1])
