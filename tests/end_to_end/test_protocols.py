"""Every protocol through the door: what the engine's own server answers, and exact tokens.

Each request is put to the engine and then to the gateway. The replies must be the same but for ids
and times, and what was recorded of the second must be the text that it answered.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from end_to_end.shared_engine import SharedEngine
from lightning_ray.gateway import (
    Answerer,
    GatewayConfig,
    choose_port,
    make_roles,
    start_gateway,
    stop_gateway,
)
from lightning_ray.inference import Attribution, InferenceGroup, attribution_headers
from lightning_ray.rollouts import QueueClient, RolloutsConfig, RolloutSpec, start_queue
from lightning_ray.spans import SpanClient
from lightning_ray.trajectories import rebuild_trees

pytestmark = pytest.mark.timeout(900)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


@dataclass
class Stack:
    engines: InferenceGroup
    queue: QueueClient
    store: SpanClient
    url: str
    model: Path
    version: int
    attempts: int = 0

    def direct(self, path: str, body: Any) -> httpx.Response:
        by = Attribution("run", "direct", "direct/1", "gpt-4o-mini", path)
        headers = attribution_headers(self.engines.key, by)
        return httpx.post(self.engines.urls[0] + path, headers=headers, json=body, timeout=120)

    def through(self, path: str, body: Any, **sampling: float) -> tuple[httpx.Response, str]:
        """The reply to an attempt of its own, and the attempt's id."""
        self.attempts += 1
        spec = RolloutSpec(f"p{self.attempts}", "task", {}, 600.0, sampling=sampling)
        self.queue.enqueue([spec])
        lease = ray.get(self.queue.actor.dequeue.remote(5), timeout=10)
        url = f"{self.url}/a/{lease.capability}{path}"
        return httpx.post(url, json=body, timeout=120), lease.attempt_id

    def calls(self, attempt_id: str) -> list[dict[str, Any]]:
        return self.store.get([attempt_id]).to_pylist()

    def text(self, call: dict[str, Any], *, special: bool = False) -> str:
        """The sampled tokens of a recorded call as text."""
        sampled = call["token_ids"][-len(call["logprobs"]) :]
        return _tokenizer(self.model).decode(sampled, skip_special_tokens=not special)


@cache
def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def stack(shared_engine: SharedEngine) -> Iterator[Stack]:
    shared_engine.take_on(shared_engine.base)
    engines, store = shared_engine.group, shared_engine.store
    queue = start_queue("run", RolloutsConfig())
    gateway = GatewayConfig()
    url = start_gateway(
        gateway,
        choose_port(gateway),
        "run",
        queue.actor,
        make_roles(gateway, "policy", ["policy"]),
        [Answerer("policy", tuple(engines.urls), engines.key)],
        store,
    )
    yield Stack(engines, queue, store, url, shared_engine.base, shared_engine.version)
    stop_gateway("run")
    ray.kill(queue.actor)


SAY = [{"role": "user", "content": "Say one short sentence about the sea."}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTION = {"name": "add", "description": "Adds to a.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
FLAT_TOOL = {"type": "function", **FUNCTION}
ANTHROPIC_TOOL = {"name": "add", "description": "Adds to a.", "input_schema": SCHEMA}
NAMED = {"type": "function", "function": {"name": "add"}}
JSON_SCHEMA = {"name": "number", "schema": SCHEMA, "strict": True}


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": SAY, "max_tokens": 12, **more}


def responses(**more: Any) -> dict[str, Any]:
    return {"input": "Say one short sentence about the sea.", "max_output_tokens": 16, **more}


def messages(**more: Any) -> dict[str, Any]:
    return {"messages": SAY, "max_tokens": 12, **more}


REQUESTS = {
    "chat": (CHAT, chat()),
    "chat stop": (CHAT, chat(stop=["e"])),
    "chat logprobs": (CHAT, chat(logprobs=True, top_logprobs=2)),
    "chat n": (CHAT, chat(n=2, temperature=1.0, seed=7)),
    "chat schema": (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": JSON_SCHEMA}, max_tokens=40),
    ),
    "chat tools auto": (CHAT, chat(tools=[TOOL])),
    "chat tools required": (CHAT, chat(tools=[TOOL], tool_choice="required", max_tokens=60)),
    "chat tools named": (CHAT, chat(tools=[TOOL], tool_choice=NAMED, max_tokens=60)),
    "completions": (TEXT, {"prompt": "One, two, three,", "max_tokens": 12}),
    "completions logprobs": (TEXT, {"prompt": "One, two,", "max_tokens": 8, "logprobs": 2}),
    "responses": (RESPONSES, responses()),
    "responses schema": (
        RESPONSES,
        responses(text={"format": {"type": "json_schema", **JSON_SCHEMA}}, max_output_tokens=40),
    ),
    "responses tools": (
        RESPONSES,
        responses(tools=[FLAT_TOOL], tool_choice="required", max_output_tokens=60),
    ),
    "messages": (MESSAGES, messages()),
    "messages stop": (MESSAGES, messages(stop_sequences=["e"], system="Be brief.")),
    "messages tools": (
        MESSAGES,
        messages(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=60),
    ),
}

QUICK_WHOLE = {"chat", "chat n", "chat tools required", "completions", "responses", "messages"}
QUICK_STREAMED = {
    "chat",
    "chat schema",
    "chat logprobs",
    "responses",
    "messages stop",
    "messages tools",
}
"""Between them every protocol and everything asked of one; the rest is in `make test-all`."""


def requests(quick: set[str]) -> list[Any]:
    """The names of all requests, of which those that are not `quick` are slow tests."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in REQUESTS]


_IDS = re.compile(r'"(id|item_id|call_id|response_id)": ?"[^"]*"')
_TIMES = re.compile(r'"(created|created_at|completed_at)": ?[0-9.]+')


def plain(content: bytes) -> str:
    """A reply without ids and times."""
    return _TIMES.sub(r'"\1":0', _IDS.sub(r'"\1":"id"', content.decode()))


def events(content: bytes) -> list[Any]:
    """The events of a stream, without ids and times."""
    lines = [line for line in plain(content).splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def strings(value: Any) -> Iterator[str]:
    """Every string somewhere in a reply."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def said(event: Any, path: str) -> str:
    """What an event of a stream adds to the answer."""
    if path == CHAT:
        deltas = [choice["delta"] for choice in event["choices"]]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or []]
        parts = [delta.get("content") for delta in deltas]
        return "".join(part or "" for part in parts + [call.get("arguments") for call in calls])
    if path == TEXT:
        return "".join(choice["text"] for choice in event["choices"])
    if path == RESPONSES:
        kinds = ("response.output_text.delta", "response.function_call_arguments.delta")
        return event["delta"] if event["type"] in kinds else ""
    delta = event.get("delta", {})
    return str(delta.get("text") or delta.get("partial_json") or "")


def warm(stack: Stack, path: str, body: dict[str, Any]) -> None:
    """Has the prompt read, so that whoever asks next finds the same of it in the prefix cache."""
    stack.direct(path, {**body, "max_output_tokens" if path == RESPONSES else "max_tokens": 1})


@pytest.mark.parametrize("name", requests(QUICK_WHOLE))
def test_a_reply_is_the_engines_own_and_its_tokens_are_recorded(stack: Stack, name: str) -> None:
    path, body = REQUESTS[name]
    body = {"model": "gpt-4o-mini", "temperature": 0, **body}
    warm(stack, path, body)
    own = stack.direct(path, body)
    reply, attempt = stack.through(path, body)
    assert reply.status_code == own.status_code == 200, reply.text
    assert plain(reply.content) == plain(own.content)
    assert reply.headers["content-type"] == own.headers["content-type"]
    trees, inexact = rebuild_trees(stack.store.get([attempt]))
    assert inexact == {} and len(trees) == 1
    calls = stack.calls(attempt)
    assert len(calls) == body.get("n", 1)
    answers = list(strings(reply.json()))
    for call in calls:
        assert (call["version"], call["policy"]) == (stack.version, "policy")
        text = stack.text(call)
        if "tools" in body and "auto" not in name:
            wanted = given_to_tool(text)
            inputs = [*answers, *(json.dumps(part) for part in inputs_of(reply.json()))]
            assert any(is_json(one, wanted) for one in inputs), text
        else:
            # A stop sequence is sampled and not shown.
            assert any(one and text.startswith(one) for one in answers), text
            assert "stop" in name or text in answers


def inputs_of(value: Any) -> Iterator[Any]:
    """What Anthropic's tool calls are given, which are objects and no texts."""
    for block in value.get("content") or []:
        if isinstance(block, dict) and block.get("type") == "tool_use":
            yield block["input"]


def is_json(text: str, wanted: Any) -> bool:
    try:
        return bool(json.loads(text) == wanted)
    except ValueError:
        return False


@pytest.mark.parametrize("name", requests(QUICK_STREAMED))
def test_a_stream_is_the_engines_own_and_its_tokens_are_recorded(stack: Stack, name: str) -> None:
    path, body = REQUESTS[name]
    body = {"model": "gpt-4o-mini", "temperature": 0, **body, "stream": True}
    if path in (CHAT, TEXT):
        body["stream_options"] = {"include_usage": True}
    warm(stack, path, body)
    own = stack.direct(path, body)
    reply, attempt = stack.through(path, body)
    assert reply.status_code == own.status_code == 200, reply.text
    assert reply.headers["content-type"] == own.headers["content-type"]
    ours, theirs = events(reply.content), events(own.content)
    # How many tokens an event brings is chance; all that they bring together is not.
    assert [said(event, path) for event in ours].count("") > 0 or path == TEXT
    whole = "".join(said(event, path) for event in ours)
    if body.get("n", 1) == 1:
        assert whole == "".join(said(event, path) for event in theirs) != ""
    assert kinds(ours) == kinds(theirs)
    assert unnumbered(ours[-1]) == unnumbered(theirs[-1])
    if path == RESPONSES:
        assert [event["sequence_number"] for event in ours] == list(range(len(ours)))
    calls = stack.calls(attempt)
    assert len(calls) == body.get("n", 1)
    for call in calls:
        text = stack.text(call)
        if body.get("n", 1) > 1:
            index = json.loads(call["attributes"])["choice"]
            whole = "".join(
                choice["delta"].get("content") or ""
                for event in ours
                for choice in event["choices"]
                if choice["index"] == index
            )
        if "tools" in body and "auto" not in name:
            assert json.loads(whole) == given_to_tool(text)
        else:
            assert text.startswith(whole) and ("stop" in name or text == whole)


def unnumbered(event: Any) -> Any:
    """An event without its place in the stream, for how many come before it is chance."""
    return {name: value for name, value in event.items() if name != "sequence_number"}


def given_to_tool(text: str) -> Any:
    """What the one tool call in sampled text gives its tool, in whichever format it is."""
    made, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    return made.get("arguments", made.get("parameters", made))


def kinds(some: list[Any]) -> list[str]:
    """The kinds of events in their order, each run of one kind once."""
    found = [str(event.get("type") or event.get("object")) for event in some]
    return [kind for place, kind in enumerate(found) if place == 0 or found[place - 1] != kind]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (MESSAGES + "/count_tokens", messages(), 200),
        ("/v1/embeddings", {"input": "a"}, None),
        (CHAT, chat(max_tokens=10_000), 400),
        (CHAT, chat(temperature=-1), 400),
        (RESPONSES, responses(temperature="warm"), 400),
        (MESSAGES, {"messages": SAY}, 400),
    ],
)
def test_what_else_the_engines_server_answers_passes_as_it_is(
    stack: Stack, path: str, body: dict[str, Any], status: int | None
) -> None:
    body = {"model": "gpt-4o-mini", **body}
    own = stack.direct(path, body)
    reply, attempt = stack.through(path, body)
    assert (reply.status_code, plain(reply.content)) == (own.status_code, plain(own.content))
    assert reply.status_code == status or (status is None and reply.status_code >= 400)
    assert stack.calls(attempt) == []


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, MESSAGES])
def test_a_run_sets_how_calls_are_sampled_in_every_protocol(stack: Stack, path: str) -> None:
    _, body = next(request for request in REQUESTS.values() if request[0] == path)
    body = {"model": "gpt-4o-mini", "temperature": 0.9, **body}
    limits = {"temperature": 0.5, "max_tokens": 6, "seed": 11}
    calls = []
    for _ in range(2):
        reply, attempt = stack.through(path, body, **limits)
        assert reply.status_code == 200
        (call,) = stack.calls(attempt)
        calls.append(call)
        attributes = json.loads(call["attributes"])
        assert attributes["asked"]["temperature"] == 0.9
        assert attributes["asked"]["max_tokens"] > 6
        drawn = attributes["sampling"]
        assert (drawn["temperature"], drawn["max_tokens"]) == (0.5, 6)
        assert len(call["logprobs"]) <= 6
    # Two attempts draw differently from one seed.
    seeds = [json.loads(call["attributes"])["sampling"]["seed"] for call in calls]
    assert len(set(seeds)) == 2
    reply, attempt = stack.through(path, body, temperature=0)
    (call,) = stack.calls(attempt)
    assert json.loads(call["attributes"])["sampling"]["temperature"] == 0
