"""Reading requests and answers of every protocol, and of none."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.doctor.exchange import (
    Asked,
    count_tool_calls,
    read_error,
    read_request,
    renamed,
)

KEYS = ["model", "messages", "input", "prompt", "system", "instructions", "tools", "stream"]
KEYS += ["choices", "output", "content", "delta", "message", "tool_calls", "role", "type", "text"]
KEYS += ["index", "error", "item", "content_block"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def read(**request: Any) -> Asked:
    return read_request(json.dumps(request).encode())


@pytest.mark.parametrize(
    ("request_body", "system"),
    [
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "Be brief."),
        ({"messages": [{"role": "developer", "content": [{"text": "Be brief."}]}]}, "Be brief."),
        ({"system": "Be brief.", "messages": []}, "Be brief."),
        ({"system": [{"type": "text", "text": "Be"}, {"text": "brief."}]}, "Be\nbrief."),
        ({"instructions": "Be brief.", "input": "hello"}, "Be brief."),
        ({"messages": [{"role": "user", "content": "Be brief."}]}, ""),
    ],
)
def test_the_system_prompt_is_found_in_every_protocol(request_body: dict, system: str) -> None:
    assert read(**request_body).system == system


def test_a_request_is_reduced_to_what_is_judged() -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    first = read(model="m", messages=history[:1], tools=[{}, {}], stream=True)
    later = read(model="m", messages=[*history, {"role": "user", "content": "and?"}])
    assert (first.model, first.stream, first.tools) == ("m", True, 2)
    assert later.messages[:1] == first.messages and later.replies == (False, True, False)
    assert "hi" not in str(first)


CHAT = {"choices": [{"message": {"tool_calls": [{"id": "1"}, {"id": "2"}]}}]}
RESPONSES = {"output": [{"type": "message"}, {"type": "function_call"}]}
MESSAGES = {"content": [{"type": "text"}, {"type": "tool_use"}]}


@pytest.mark.parametrize(("reply", "count"), [(CHAT, 2), (RESPONSES, 1), (MESSAGES, 1), ({}, 0)])
def test_tool_calls_are_counted_in_every_protocol(reply: dict, count: int) -> None:
    assert count_tool_calls(json.dumps(reply).encode()) == count


def test_streamed_tool_calls_are_counted_once_each() -> None:
    def stream(*events: dict) -> bytes:
        return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events) + b"data: [D"

    pieces = [{"index": 0}, {"index": 0}, {"index": 1}]
    chat = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]} for piece in pieces]
    assert count_tool_calls(stream(*chat)) == 2
    responses = {"type": "response.output_item.added", "output_index": 1}
    assert count_tool_calls(stream(responses | {"item": {"type": "function_call"}})) == 1
    assert count_tool_calls(stream(responses | {"item": {"type": "message"}})) == 0
    messages = {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use"}}
    assert count_tool_calls(stream(messages, {"type": "message_stop"})) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "no such\\n model", "code": 404}}',
        b'{"type": "error", "error": {"type": "x", "message": "no such model"}}',
        b'{"error": "no such model"}',
        b'{"detail": "no such model"}',
        b"no such   model\n",
    ],
)
def test_the_message_of_an_error(body: bytes) -> None:
    assert read_error(body) == "no such model"


def test_a_request_keeps_everything_but_its_models_name() -> None:
    body = json.dumps({"model": "mine", "messages": [{"content": "ü"}], "x": [1.5, None]}).encode()
    assert json.loads(renamed(body, "theirs")) == json.loads(body) | {"model": "theirs"}


@given(JSON | st.binary().map(lambda b: b.decode("latin-1")))
def test_nothing_that_is_sent_makes_it_raise(value: Any) -> None:
    body = json.dumps(value).encode()
    for piece in (body, body[1:], b"data: " + body + b"\n\ndata: " + body):
        assert isinstance(read_request(piece), Asked)
        assert count_tool_calls(piece) >= 0
        assert len(read_error(piece)) <= 300
