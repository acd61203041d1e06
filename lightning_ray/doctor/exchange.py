"""One request of an agent and what it was answered, reduced to what the checks need.

Invariant: no header is kept, and of texts only what a report shows: a digest of each message, the
system prompt, the message of an error. Whatever an agent sends or is sent, nothing here raises.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SYSTEM = ("system", "developer")
SHOWN = 300
"""How much of an error's message is kept, characters."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for, whichever protocol it speaks."""

    model: str | None = None
    stream: bool = False
    tools: int = 0
    """Tools that it lets the model call."""
    system: str = ""
    """Its system prompt."""
    messages: tuple[str, ...] = ()
    """A digest of each message, in order; a prompt that is one text is one message."""
    replies: tuple[bool, ...] = ()
    """For each message whether it is one of the model's own."""


@dataclass(frozen=True)
class Exchange:
    """A request and its answer."""

    attempt_id: str
    """Empty when its base URL belonged to no running attempt."""
    method: str
    path: str
    """The path below the base URL, as the agent wrote it."""
    asked: Asked
    status: int | None
    """HTTP status of the answer; None when the agent went away before it."""
    error: str = ""
    """What a refusal says."""
    tool_calls: int = 0
    """Tool calls in the answer that the protocol's own fields name."""

    @property
    def answered(self) -> bool:
        """Whether the agent got what it asked for."""
        return self.status is not None and 200 <= self.status < 300


def read_request(body: bytes) -> Asked:
    """What the body of a request asks for; nothing known of one that is no JSON object."""
    request = _parse(body)
    if not isinstance(request, dict):
        return Asked()
    messages = _messages(request)
    return Asked(
        model=request["model"] if isinstance(request.get("model"), str) else None,
        stream=request.get("stream") is True,
        tools=len(request["tools"]) if isinstance(request.get("tools"), list) else 0,
        system=_system(request),
        messages=tuple(_digest(message) for message in messages),
        replies=tuple(_is_reply(message) for message in messages),
    )


def read_error(body: bytes) -> str:
    """The message of an error in the shape of any of the protocols, else the start of the body."""
    error = _parse(body)
    while isinstance(error, dict):
        inner = error.get("error", error.get("message", error.get("detail")))
        if inner is None or inner is error:
            break
        error = inner
    text = error if isinstance(error, str) else body.decode("utf-8", "replace")
    return " ".join(text.split())[:SHOWN]


def count_tool_calls(body: bytes) -> int:
    """The tool calls in an answer, streamed or not, of any of the protocols."""
    whole = _parse(body)
    if isinstance(whole, dict):
        return len(list(_calls_in(whole)))
    events = [_parse(line[5:]) for line in body.splitlines() if line.startswith(b"data:")]
    return len({call for event in events if isinstance(event, dict) for call in _begun(event)})


def renamed(body: bytes, model: str) -> bytes:
    """The same request for another model."""
    request = _parse(body)
    assert isinstance(request, dict)
    return json.dumps({**request, "model": model}).encode()


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _messages(request: Mapping[str, Any]) -> list[Any]:
    for name in ("messages", "input", "prompt"):
        found = request.get(name)
        if isinstance(found, list):
            return found
        if found is not None:
            return [found]
    return []


def _system(request: Mapping[str, Any]) -> str:
    # Anthropic's and Responses' own fields, else the messages that say they are the system's.
    for name in ("system", "instructions"):
        if request.get(name):
            return _text(request[name])
    texts = [
        _text(message.get("content"))
        for message in _messages(request)
        if isinstance(message, dict) and message.get("role") in _SYSTEM
    ]
    return "\n".join(texts)


def _text(content: Any) -> str:
    """The text of a message's content, a string or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(
            part["text"]
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return ""


def _is_reply(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    return message.get("role") == "assistant" or message.get("type") == "function_call"


def _digest(message: Any) -> str:
    return hashlib.sha256(json.dumps(message, sort_keys=True).encode()).hexdigest()[:16]


def _list(container: Any, name: str) -> Sequence[Mapping[str, Any]]:
    found = container.get(name) if isinstance(container, dict) else None
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _calls_in(reply: Mapping[str, Any]) -> Iterator[Any]:
    """Tool calls of an unstreamed answer: chat, Responses, Messages."""
    for choice in _list(reply, "choices"):
        yield from _list(choice.get("message"), "tool_calls")
    yield from (item for item in _list(reply, "output") if item.get("type") == "function_call")
    yield from (part for part in _list(reply, "content") if part.get("type") == "tool_use")


def _begun(event: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The tool calls that an event of a stream belongs to, or begins, each by its place."""
    for choice in _list(event, "choices"):
        for call in _list(choice.get("delta"), "tool_calls"):
            yield _number(choice), _number(call)
    kinds = {"response.output_item.added": "item", "content_block_start": "content_block"}
    begun = event.get(kinds.get(str(event.get("type")), ""))
    if isinstance(begun, dict) and begun.get("type") in ("function_call", "tool_use"):
        yield event.get("type"), _number(event)


def _number(item: Mapping[str, Any]) -> int:
    found = item.get("index", item.get("output_index", 0))
    return found if isinstance(found, int) else 0
