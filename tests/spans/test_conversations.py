import json
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from spans_support import row

from lightning_ray.spans import to_batch
from lightning_ray.spans.conversations import CONTINUES, RequestLog, whole_requests

VALUES = st.sampled_from(["a", "b", "ä\ud800", {"role": "user", "content": "a"}, ["x", 1.5], None])
REQUESTS = st.fixed_dictionaries(
    {"messages": st.lists(VALUES, max_size=5)},
    optional={"system": st.sampled_from(["p", "q"]), "tools": st.lists(VALUES, max_size=2)},
) | st.sampled_from([{"prompt": "p"}, {"input": "text"}, {"input": ["a"], "instructions": "i"}, {}])


def stored(asked: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of requests (attempt, request) as a writer stores them, ids in their order."""
    log = RequestLog()
    rows = []
    for number, (attempt, request) in enumerate(asked):
        attributes = json.dumps({"request": log.shorten(attempt, request)})
        rows.append(row(str(number), attempt) | {"attributes": attributes})
        log.stored(attempt, str(number), request)
    return rows


@given(st.lists(st.tuples(st.sampled_from(["r/1", "r/2"]), REQUESTS), max_size=12))
def test_every_request_comes_back_as_it_was_asked(asked: list[tuple[str, dict[str, Any]]]) -> None:
    table = pa.Table.from_batches([to_batch(stored(asked))])
    expected = {str(number): request for number, (_, request) in enumerate(asked)}
    assert whole_requests(table) == expected


def conversation(turns: int) -> list[tuple[str, dict[str, Any]]]:
    messages = [{"role": "user", "content": f"turn {turn} " + "x" * 200} for turn in range(turns)]
    tools = [{"name": "calculator", "description": "y" * 500}]
    return [("r/1", {"messages": messages[: n + 1], "tools": tools}) for n in range(turns)]


def test_a_long_conversation_costs_no_more_a_turn_than_a_short_one() -> None:
    def bytes_a_turn(turns: int) -> float:
        return sum(len(made["attributes"]) for made in stored(conversation(turns))) / turns

    assert bytes_a_turn(64) <= 1.1 * bytes_a_turn(8)


def test_a_rewritten_context_is_stored_whole_from_where_it_differs() -> None:
    asked = conversation(3)
    rewritten = [{"role": "user", "content": "a summary"}]
    rows = stored([*asked, ("r/1", {"messages": rewritten})])
    assert CONTINUES in json.loads(rows[2]["attributes"])["request"]
    assert json.loads(rows[3]["attributes"])["request"] == {"messages": rewritten}


def test_a_request_whose_predecessor_is_missing_is_left_out() -> None:
    table = pa.Table.from_batches([to_batch(stored(conversation(3))[1:])])
    assert whole_requests(table) == {}
