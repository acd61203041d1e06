"""Reading what an upstream said, in each protocol, streamed or not, whatever the cuts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.gateway.reply_reader import ReplyReader

CHAT = {
    "id": "c1",
    "model": "m-1",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "content": "Hello",
                "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
        }
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7},
}
CHAT_EVENTS = [
    {"id": "c1", "model": "m-1", "choices": [{"index": 0, "delta": {"content": "Hel"}}]},
    {"choices": [{"index": 0, "delta": {"content": "lo"}}]},
    {
        "choices": [
            {
                "index": 0,
                "delta": {
                    "tool_calls": [{"index": 0, "function": {"name": "add", "arguments": '{"a"'}}]
                },
            }
        ]
    },
    {
        "choices": [
            {
                "index": 0,
                "delta": {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
                "finish_reason": "tool_calls",
            }
        ]
    },
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}},
]
ANTHROPIC = {
    "id": "c1",
    "type": "message",
    "model": "m-1",
    "content": [
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "name": "add", "input": {"a": 1}},
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 5, "output_tokens": 7},
}
ANTHROPIC_EVENTS = [
    {
        "type": "message_start",
        "message": {"id": "c1", "model": "m-1", "usage": {"input_tokens": 5, "output_tokens": 1}},
    },
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "name": "add"},
    },
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": '{"a": 1}'},
    },
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use"},
        "usage": {"output_tokens": 7},
    },
    {"type": "message_stop"},
]
RESPONSES = {
    "id": "c1",
    "model": "m-1",
    "status": "completed",
    "output": [
        {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]},
        {"type": "function_call", "name": "add", "arguments": '{"a": 1}'},
    ],
    "usage": {"input_tokens": 5, "output_tokens": 7},
}
RESPONSES_EVENTS = [
    {"type": "response.created", "response": {"id": "c1", "model": "m-1", "output": []}},
    {"type": "response.output_text.delta", "delta": "Hello"},
    {"type": "response.completed", "response": RESPONSES},
]


def events(values: list[dict]) -> bytes:
    return (
        b"".join(b"data: " + json.dumps(v).encode() + b"\n\n" for v in values) + b"data: [DONE]\n\n"
    )


@pytest.mark.parametrize(
    ("streamed", "content"),
    [
        (False, json.dumps(CHAT).encode()),
        (True, events(CHAT_EVENTS)),
        (False, json.dumps(ANTHROPIC).encode()),
        (True, events(ANTHROPIC_EVENTS)),
        (False, json.dumps(RESPONSES).encode()),
        (True, events(RESPONSES_EVENTS)),
    ],
    ids=["chat", "chat-stream", "messages", "messages-stream", "responses", "responses-stream"],
)
@given(data=st.data())
def test_a_reply_reads_the_same_in_every_protocol_however_it_is_cut(streamed, content, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    reader = ReplyReader(streamed)
    for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        reader.feed(content[begin:end])
    reply = reader.result()
    assert (reply.text, reply.model, reply.reply_id) == ("Hello", "m-1", "c1")
    assert (reply.input_tokens, reply.output_tokens) == (5, 7)
    (call,) = reply.tool_calls
    assert (call["name"], json.loads(call["arguments"])) == ("add", {"a": 1})
    assert reply.finish_reason in ("tool_calls", "tool_use", "completed")


@given(st.binary(), st.booleans())
def test_anything_at_all_can_be_read(content, streamed):
    reader = ReplyReader(streamed)
    reader.feed(content)
    reader.result()


KEYS = (
    "choices delta message content output usage id tool_calls function name type response "
    "input_tokens index"
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(JSON)
def test_any_json_at_all_can_be_read(value):
    reader = ReplyReader(streamed=False)
    reader.feed(json.dumps(value).encode())
    reader.result()
