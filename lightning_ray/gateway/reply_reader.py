"""What an upstream's reply says, read beside the bytes that pass: text, tool calls, usage.

Invariant: reading never changes or holds back a byte, and a reply in a form that is not known
gives less, never an error: what an agent gets does not depend on what we understand of it.
"""

import json
from dataclasses import dataclass, field
from typing import Any

LIMIT_BYTES = 8 * 1024 * 1024
"""Of a reply, how much is kept for reading."""

Json = dict[str, Any]


@dataclass
class Reply:
    """What was understood of a reply."""

    text: str = ""
    tool_calls: list[Json] = field(default_factory=list)
    """Each with `name` and `arguments` (JSON text)."""
    model: str | None = None
    reply_id: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class ReplyReader:
    """Collects a reply's bytes, streamed (server-sent events) or not."""

    def __init__(self, streamed: bool):
        self._streamed = streamed
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, part: bytes) -> None:
        """One more piece, in order."""
        if self._size < LIMIT_BYTES:
            self._parts.append(part)
            self._size += len(part)

    def result(self) -> Reply:
        """What the reply says as far as it came."""
        content = b"".join(self._parts)
        reply = Reply()
        pieces = _events(content) if self._streamed else [content]
        calls: dict[str, Json] = {}
        for piece in pieces:
            try:
                value = json.loads(piece)
            except (ValueError, RecursionError):
                continue  # "[DONE]", or an event that was cut off
            if isinstance(value, dict):
                _take(reply, calls, value)
        reply.tool_calls += [call for call in calls.values() if call["name"]]
        return reply


def _events(content: bytes) -> list[bytes]:
    """The data of server-sent events."""
    events = content.replace(b"\r\n", b"\n").split(b"\n\n")
    return [
        b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        for event in events
    ]


def _take(reply: Reply, calls: dict[str, Json], value: Json) -> None:
    """Adds what one body or event says. The protocols' fields do not collide."""
    inner = value.get("response") if isinstance(value.get("response"), dict) else None
    start = value.get("message") if value.get("type") == "message_start" else None
    for part in (value, inner, start):
        if isinstance(part, dict):
            reply.reply_id = reply.reply_id or _string(part.get("id"))
            reply.model = reply.model or _string(part.get("model"))
            _take_usage(reply, part.get("usage"))
    _take_chat(reply, calls, value)
    _take_anthropic(reply, calls, value)
    _take_responses(reply, calls, inner or value)


def _take_usage(reply: Reply, usage: Any) -> None:
    if not isinstance(usage, dict):
        return
    for names, attribute in (
        (("prompt_tokens", "input_tokens"), "input_tokens"),
        (("completion_tokens", "output_tokens"), "output_tokens"),
    ):
        for name in names:
            if isinstance(usage.get(name), int):
                setattr(reply, attribute, usage[name])


def _take_chat(reply: Reply, calls: dict[str, Json], value: Json) -> None:
    for choice in _dicts(value.get("choices")):
        reply.finish_reason = _string(choice.get("finish_reason")) or reply.finish_reason
        reply.text += _string(choice.get("text")) or ""
        for key in ("message", "delta"):
            message = choice.get(key)
            if not isinstance(message, dict):
                continue
            reply.text += _string(message.get("content")) or ""
            for place, call in enumerate(_dicts(message.get("tool_calls"))):
                function = call.get("function")
                if isinstance(function, dict):
                    slot = (choice.get("index", 0), call.get("index", place))
                    _extend(calls, slot, function.get("name"), function.get("arguments"))


def _take_anthropic(reply: Reply, calls: dict[str, Json], value: Json) -> None:
    reply.finish_reason = _string(value.get("stop_reason")) or reply.finish_reason
    delta = value.get("delta")
    if isinstance(delta, dict):
        reply.finish_reason = _string(delta.get("stop_reason")) or reply.finish_reason
        if value.get("type") == "content_block_delta":
            reply.text += _string(delta.get("text")) or ""
            if delta.get("type") == "input_json_delta":
                _extend(calls, value.get("index"), None, delta.get("partial_json"))
    block = value.get("content_block")
    for place, part in enumerate(_dicts(value.get("content"))):
        if part.get("type") == "text":
            reply.text += _string(part.get("text")) or ""
        elif part.get("type") == "tool_use":
            _extend(calls, place, part.get("name"), json.dumps(part.get("input")))
    if isinstance(block, dict) and block.get("type") == "tool_use":
        _extend(calls, value.get("index"), block.get("name"), "")


def _take_responses(reply: Reply, calls: dict[str, Json], value: Json) -> None:
    # A stream's last event holds the whole output, so its deltas are not needed.
    for place, item in enumerate(_dicts(value.get("output"))):
        if item.get("type") == "function_call":
            calls.pop(str(("output", place)), None)
            _extend(calls, ("output", place), item.get("name"), item.get("arguments"))
        texts = [_string(part.get("text")) or "" for part in _dicts(item.get("content"))]
        if item.get("type") == "message":
            reply.text += "".join(texts)
    if isinstance(value.get("output"), list):
        reply.finish_reason = _string(value.get("status")) or reply.finish_reason


def _extend(calls: dict[str, Json], slot: Any, name: Any, arguments: Any) -> None:
    # As text: an index may be anything that JSON has.
    call = calls.setdefault(str(slot), {"name": "", "arguments": ""})
    call["name"] += _string(name) or ""
    call["arguments"] += _string(arguments) or ""


def _dicts(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None
