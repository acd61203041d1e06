"""The system prompt of a request, in every protocol that has one: reading it, and replacing it.

Invariant: what is not the system prompt, or the demonstrations put behind it, is left as it was.
"""

from collections.abc import Sequence
from typing import Any

from lightning_ray.policies import PromptVersion

Json = dict[str, Any]
_SYSTEM_ROLES = ("system", "developer")
_TEXT_BLOCKS = ("text", "input_text")


def system_prompt(path: str, body: Json) -> str:
    """The request's system prompt; empty where it has none."""
    if path.startswith("/v1/messages"):
        return _text(body.get("system"))
    if path == "/v1/responses":
        parts = [_text(body.get("instructions"))]
        given = body.get("input")
        parts += _leading(given) if isinstance(given, list) else []
        return "\n".join(part for part in parts if part)
    messages = body.get("messages")
    return "\n".join(_leading(messages)) if isinstance(messages, list) else ""


def asked(body: Json) -> str:
    """The text of the request's last message where that is a user's, and nothing but text.

    Empty for any other: what a tool said, an image, a bare completion.
    """
    given = body.get("input", body.get("messages"))
    if isinstance(given, str):
        return given
    last = given[-1] if isinstance(given, list) and given else None
    if not isinstance(last, dict) or last.get("role") != "user":
        return ""
    content = last.get("content")
    blocks = content if isinstance(content, list) else []
    if any(not isinstance(b, dict) or b.get("type") not in _TEXT_BLOCKS for b in blocks):
        return ""
    return _text(content)


def apply_prompt(path: str, body: Json, prompt: PromptVersion) -> Json | None:
    """The request with `prompt` in the place of its seed; None where the seed does not occur."""
    if prompt.seed not in system_prompt(path, body):
        return None
    if path.startswith("/v1/messages"):
        changed = {**body, "system": _replaced(body.get("system"), prompt)}
        return _with_demonstrations(changed, "messages", 0, prompt)
    if path == "/v1/responses":
        changed = {**body, "instructions": _replaced(body.get("instructions"), prompt)}
        if isinstance(body.get("input"), str):
            changed["input"] = [{"role": "user", "content": body["input"]}]
        return _in_messages(changed, "input", prompt)
    return _in_messages(dict(body), "messages", prompt)


def _in_messages(body: Json, key: str, prompt: PromptVersion) -> Json:
    leading = _count_leading(body[key])
    messages = [
        {**message, "content": _replaced(message.get("content"), prompt)}
        if place < leading
        else message
        for place, message in enumerate(body[key])
    ]
    # A prompt that is empty is no message: some chat templates would write an empty turn.
    kept = [m for i, m in enumerate(messages) if i >= leading or _text(m.get("content"))]
    removed = len(messages) - len(kept)
    return _with_demonstrations({**body, key: kept}, key, leading - removed, prompt)


def _with_demonstrations(body: Json, key: str, place: int, prompt: PromptVersion) -> Json:
    turns = [
        {"role": role, "content": content}
        for exchange in prompt.demonstrations
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    messages = list(body.get(key) or [])
    return {**body, key: messages[:place] + turns + messages[place:]}


def _replaced(content: Any, prompt: PromptVersion) -> Any:
    if isinstance(content, str):
        return content.replace(prompt.seed, prompt.text)
    if isinstance(content, list):
        return [
            {**block, "text": block["text"].replace(prompt.seed, prompt.text)}
            if isinstance(block, dict) and isinstance(block.get("text"), str)
            else block
            for block in content
        ]
    return content


def _count_leading(messages: Sequence[Any]) -> int:
    """How many messages at the beginning are the system's."""
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _SYSTEM_ROLES:
            return place
    return len(messages)


def _leading(messages: list[Any]) -> list[str]:
    return [_text(message.get("content")) for message in messages[: _count_leading(messages)]]


def _text(content: Any) -> str:
    """The text of a message's content, which is a string or a list of blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [block.get("text") for block in content if isinstance(block, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))
