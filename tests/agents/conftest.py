"""Agents in folders of their own, and a model that is canned."""

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.agents import AgentConfig


@pytest.fixture
def agent(tmp_path: Path) -> Callable[..., AgentConfig]:
    """Writes an agent's files into a folder of its own and returns its configuration."""

    def make(
        source: str, *arguments: str, files: Mapping[str, str] | None = None, **settings: Any
    ) -> AgentConfig:
        folder = tmp_path / "agent"
        folder.mkdir(exist_ok=True)
        for name, content in {"agent.py": source, **(files or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        settings.setdefault("command", ["python", "agent.py", *arguments])
        return AgentConfig(name="test", cwd=str(folder), grader="unused:unused", **settings)

    return make


@pytest.fixture
def model():
    """A server of chat completions that says what it is told to, and notes what it is asked.

    Anything else that is posted to it is noted too, and taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, body, self.headers["Authorization"]))
            if not self.path.endswith("/chat/completions"):
                return self.reply({"kept": 1})
            message = {"role": "assistant", "content": server.says}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            return self.reply({**reply, "choices": [choice]})

        def reply(self, content):
            content = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.says = [], ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
