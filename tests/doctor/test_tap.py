"""The tap in front of a server that answers with known bytes."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from lightning_ray.doctor.tap import Tap

REPLY = b'{ "choices":  [{"message": {"tool_calls": [{}]}}], "\\u00fc": "\xc3\xbc"}'
PIECES = [b'data: {"n": 1}\n\n', b"data: [DONE]\n\n"]


class Upstream(BaseHTTPRequestHandler):
    """Answers by the path: whole, as a stream, with a refusal."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, dict[str, str], bytes]] = []  # noqa: RUF012 (shared by requests)
    go_on = threading.Event()
    gone = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen.append((self.command, self.path, headers, body))
        if self.path.endswith("/stream"):
            self._stream()
            return
        status = 404 if self.path.endswith("/refused") else 200
        reply = b'{"error": {"message": "not here"}}' if status == 404 else REPLY
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Engine", "1")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.path.endswith("/endless/stream"):
            self._endless()
            return
        for piece in [*PIECES, b""]:
            self._write(piece)
            self.go_on.wait(20)

    def _endless(self) -> None:
        try:
            for _ in range(2000):
                self._write(PIECES[0])
                time.sleep(0.01)
        except OSError:
            self.gone.set()

    def _write(self, piece: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def tap() -> Iterator[Tap]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    target = f"http://127.0.0.1:{server.server_address[1]}"
    attempts = {f"cap{n}": f"attempt{n}/1" for n in range(9)}
    with Tap(target, ["served"], attempts.get) as tap:
        yield tap
    server.shutdown()
    thread.join(10)


def send(tap: Tap, path: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(tap.url).port, timeout=20)
    connection.request("POST" if body else "GET", path, body or None, headers)
    reply = connection.getresponse()
    reply.connection = connection  # type: ignore[attr-defined]
    return reply


def test_bytes_pass_as_they_came_and_are_noted(tap: Tap) -> None:
    body = b'{"model":  "served", "messages": [] }'
    reply = send(tap, "/a/cap1/v1/chat/completions?x=%20&y", body, **{"anthropic-version": "1"})
    assert (reply.status, reply.read(), reply.getheader("x-engine")) == (200, REPLY, "1")
    method, path, headers, seen = Upstream.seen[-1]
    assert (method, path, seen) == ("POST", "/a/cap1/v1/chat/completions?x=%20&y", body)
    assert headers["anthropic-version"] == "1" and "accept-encoding" not in {
        name for name in headers if headers[name] != "identity"
    }
    (noted,) = tap.exchanges(["attempt1/1"])
    assert (noted.method, noted.path, noted.status) == ("POST", "/v1/chat/completions", 200)
    assert (noted.asked.model, noted.tool_calls, noted.answered) == ("served", 1, True)


def test_a_name_that_is_not_served_is_answered_and_noted_as_it_was(tap: Tap) -> None:
    send(tap, "/a/cap2/v1/messages", b'{"model": "claude", "max_tokens": 3}').read()
    assert json.loads(Upstream.seen[-1][3]) == {"model": "served", "max_tokens": 3}
    assert tap.exchanges(["attempt2/1"])[0].asked.model == "claude"


def test_a_stream_passes_while_it_is_written(tap: Tap) -> None:
    Upstream.go_on.clear()
    reply = send(tap, "/a/cap3/stream", b'{"model": "served", "stream": true}')
    # The server waits between its pieces, so a tap that collected them would give nothing yet.
    assert reply.read1(100) == PIECES[0]
    Upstream.go_on.set()
    assert reply.read() == PIECES[1]
    (noted,) = tap.exchanges(["attempt3/1"])
    assert noted.asked.stream and noted.status == 200


def test_a_refusal_is_passed_on_and_noted_with_its_message(tap: Tap) -> None:
    reply = send(tap, "/a/cap4/refused", b"no JSON")
    assert (reply.status, json.loads(reply.read())["error"]["message"]) == (404, "not here")
    (noted,) = tap.exchanges(["attempt4/1"])
    assert (noted.status, noted.error, noted.answered) == (404, "not here", False)


def test_who_has_no_attempt_is_passed_on_for_the_door_to_refuse_and_belongs_to_none(
    tap: Tap,
) -> None:
    send(tap, "/a/stranger/v1/models").read()
    assert Upstream.seen[-1][:2] == ("GET", "/a/stranger/v1/models")
    assert [noted.path for noted in tap.exchanges([""])] == ["/v1/models"]


def test_when_an_agent_goes_away_its_answer_is_no_longer_asked_for(tap: Tap) -> None:
    reply = send(tap, "/a/cap5/endless/stream", b"{}")
    reply.read1(5)
    reply.close()
    reply.connection.close()  # type: ignore[attr-defined]
    assert Upstream.gone.wait(10)
    (noted,) = tap.exchanges(["attempt5/1"])
    assert noted.status == 200 and noted.tool_calls == 0
