"""An upstream that answers each chat completion after a fixed time; a process of its own.

    python -m benchmarks.stub_upstream ANSWER_MS

Prints one JSON object, {"ready": PORT}, and serves until its standard input ends. Unstreamed the
reply is whole after that time; streamed its first piece comes then, and each further one a
millisecond later. Whatever is asked, the bytes are the same; only a call that has to choose a tool
gets a call of it.
"""

import asyncio
import json
import socket
import sys
import threading
from functools import partial
from typing import Any

from benchmarks.http_wire import Messages

ANSWER = "calc(12 + 30)"
"""What the model says: an expression that the agents of the examples go on with."""
PIECES = 8
PIECE_EVERY_S = 0.001


def reply() -> bytes:
    """The body of an unstreamed reply, spaced as no JSON library does it by itself."""
    return _reply("stop", {"role": "assistant", "content": ANSWER, "refusal": None})


def tool_reply(body: bytes) -> bytes:
    """The body of a reply that calls the first tool of the request, to add two numbers."""
    name = json.loads(body)["tools"][0]["function"]["name"]
    function = {"name": name, "arguments": json.dumps({"a": 12, "b": 30})}
    call = {"id": "call-1", "type": "function", "function": function}
    return _reply("tool_calls", {"role": "assistant", "content": None, "tool_calls": [call]})


def _reply(finish_reason: str, message: dict[str, Any]) -> bytes:
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return json.dumps(_about("chat.completion") | {"choices": [choice]}, indent=1).encode()


def events() -> list[bytes]:
    """The events of a streamed reply."""
    step = -(-len(ANSWER) // PIECES)
    texts = [ANSWER[at : at + step] for at in range(0, len(ANSWER), step)]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": {"content": text}, "finish_reason": None} for text in texts
    ]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    made = [
        json.dumps(_about("chat.completion.chunk") | {"choices": [choice]}) for choice in choices
    ]
    return [f"data: {text}\n\n".encode() for text in [*made, "[DONE]"]]


def _about(kind: str) -> dict[str, Any]:
    usage = {"prompt_tokens": 52, "completion_tokens": 9, "total_tokens": 61}
    return {"id": "chatcmpl-stub", "object": kind, "created": 1, "model": "stub", "usage": usage}


class Upstream:
    """Answers every connection's requests, each in its time."""

    def __init__(self, answer_s: float):
        self._answer_s = answer_s
        self._whole = _message(reply())
        self._head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        self._chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events()]
        self._chunks[-1] += b"0\r\n\r\n"

    def connection(self) -> Messages:
        """The protocol of one connection."""
        return Messages(self._take)

    def _take(self, connection: Messages, head: bytes, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        write = partial(_write, connection)
        if b'"stream": true' not in body and b'"stream":true' not in body:
            must_call = b'"tool_choice"' in body
            whole = _message(tool_reply(body)) if must_call else self._whole
            loop.call_later(self._answer_s, write, whole)
            return
        at = loop.time() + self._answer_s
        # Whichever timer goes off writes what is next: on a busy machine they overtake each other.
        pieces = iter([self._head + self._chunks[0], *self._chunks[1:]])
        for number in range(len(self._chunks)):
            loop.call_at(at + number * PIECE_EVERY_S, lambda: write(next(pieces)))


def _message(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def _write(connection: Messages, data: bytes) -> None:
    if not connection.transport.is_closing():
        connection.transport.write(data)


async def serve(answer_s: float) -> None:
    """Serves until standard input ends."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def watch() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(over.set)

    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = await loop.create_server(Upstream(answer_s).connection, sock=listening)
    threading.Thread(target=watch, daemon=True).start()
    print(json.dumps({"ready": listening.getsockname()[1]}), flush=True)
    await over.wait()
    server.close()


def main() -> None:
    """The command."""
    answer_s = float(sys.argv[1]) / 1000
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(answer_s))
    else:
        uvloop.run(serve(answer_s))


if __name__ == "__main__":
    main()
