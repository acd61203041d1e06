"""An OpenAI-compatible API, not ours: a model that obeys one instruction, and a reflector."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

INSTRUCTION = "Answer with calc(A + B), calc(A - B) or calc(A * B) and nothing else."
"""What makes the model answer rightly; the reflector proposes it."""

_SIGNS = {"plus": "+", "sum": "+", "minus": "-", "difference": "-", "times": "*", "product": "*"}


@dataclass
class FakeApi:
    """What was asked of it."""

    url: str = ""
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Headers and body of every completion asked for."""

    def asked(self, model: str) -> list[dict[str, Any]]:
        """The requests for a model."""
        return [body for _, body in self.requests if body["model"] == model]

    def answer(self, body: dict[str, Any]) -> str:
        """What a model says."""
        messages = body["messages"]
        if body["model"] == "reflector":
            return f"I would say it so:\n```\n{INSTRUCTION}\n```"
        if INSTRUCTION not in messages[0]["content"]:
            return "That is an interesting question."
        question = messages[-1]["content"]
        left, right = re.findall(r"\d+", question)
        sign = next(sign for word, sign in _SIGNS.items() if word in question)
        return f"calc({left} {sign} {right})"


@contextmanager
def fake_api() -> Iterator[FakeApi]:
    """Serves on a port of its own, from threads of its own."""
    api = FakeApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply({"object": "list", "data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            api.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
            message = {"role": "assistant", "content": api.answer(body)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            self._reply(
                {"id": "x", "object": "chat.completion", "choices": [choice]}
                | {"model": body["model"], "created": 0, "usage": usage}
            )

        def _reply(self, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield api
    server.shutdown()
    server.server_close()
    thread.join(10)
