"""Asking a language model behind somebody's endpoint: its key, its faults, its answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_ray.algorithms.prompt_config import ReflectionConfig
from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.training import language_model
from lightning_ray.training.language_model import LanguageModel

SAID = {"choices": [{"message": {"content": "an answer"}}]}


class Endpoint:
    """Answers what `replies` says, one after the other; the last for ever."""

    def __init__(self) -> None:
        self.url = ""
        self.replies: list[tuple[int, object]] = [(200, SAID)]
        self.requests: list[tuple[str, str | None, object]] = []

    def take(self) -> tuple[int, object]:
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(language_model.time, "sleep", lambda seconds: None)
    found = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, body: object) -> None:
            found.requests.append((self.path, self.headers["authorization"], body))
            status, reply = found.take()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join(10)


def model(endpoint: Endpoint, **settings: object) -> LanguageModel:
    return LanguageModel(ReflectionConfig(endpoint.url + "/", "big", **settings))  # type: ignore[arg-type]


def test_a_question_is_asked_with_model_key_and_settings(endpoint, monkeypatch):
    monkeypatch.setenv("BIG_KEY", "sk-secret")
    asked = model(endpoint, api_key_env="BIG_KEY", temperature=None, max_tokens=7)
    assert asked("why?") == "an answer"
    path, key, body = endpoint.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer sk-secret")
    assert body == {
        "model": "big",
        "messages": [{"role": "user", "content": "why?"}],
        "max_tokens": 7,
    }


@pytest.mark.parametrize("fault", [(503, b"busy"), (200, b"<html>"), (200, {"choices": []})])
def test_a_passing_fault_is_tried_again(endpoint, fault):
    endpoint.replies = [fault, (200, SAID)]
    assert model(endpoint)("why?") == "an answer"
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(("status", "tries"), [(429, language_model.TRIES), (400, 1)])
def test_a_lasting_fault_is_told_with_what_the_endpoint_said(endpoint, status, tries):
    endpoint.replies = [(status, b"no such model")]
    with pytest.raises(InfrastructureError, match=f"HTTP {status}: no such model") as raised:
        model(endpoint)("why?")
    assert len(endpoint.requests) == tries and endpoint.url in str(raised.value)


def test_a_key_that_is_not_set(endpoint, monkeypatch):
    monkeypatch.delenv("BIG_KEY", raising=False)
    with pytest.raises(UserError, match="api_key_env=BIG_KEY: that environment variable"):
        model(endpoint, api_key_env="BIG_KEY")


def test_a_key_that_is_refused_is_said_before_anything_starts(endpoint, monkeypatch):
    monkeypatch.setenv("BIG_KEY", "sk-secret")
    endpoint.replies = [(401, b"")]
    with pytest.raises(UserError, match=r"refuses the key \(HTTP 401\)") as raised:
        model(endpoint, api_key_env="BIG_KEY").knock()
    assert "sk-secret" not in str(raised.value)


def test_an_endpoint_without_a_list_of_models_is_there(endpoint):
    endpoint.replies = [(404, b"")]
    model(endpoint).knock()


def test_where_nobody_listens_is_said_before_anything_starts():
    nowhere = LanguageModel(ReflectionConfig("http://127.0.0.1:9/v1", "big"))
    with pytest.raises(UserError, match="no language model answers there"):
        nowhere.knock()
