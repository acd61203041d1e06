"""Upstreams that answer nonsense, or not at all: the agent gets an error, and nothing hangs."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
from doors import NOBODY, OpenDoor, open_door

from lightning_ray.gateway import (
    GatewayConfig,
    RoleConfig,
    make_roles,
    upstream_answerer,
)
from lightning_ray.policies import PolicyConfig, UpstreamConfig

LIMIT_S = 4.0
ANSWERS = {
    "garbage": b"\x00\xff no HTTP at all\r\n\r\n",
    "cut": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{",
    "no json": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n<html>...",
    "closed": b"",
}
"""What each upstream sends before it closes the connection; "hangs" never does."""


@contextmanager
def upstream(answer: bytes | None) -> Iterator[str]:
    """A server that reads a request and sends these bytes; None sends nothing and waits."""
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            if answer is None:
                over.wait(60)
            else:
                connection.sendall(answer)

    def accept() -> None:
        while not over.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        over.set()


@dataclass
class Bad:
    door: OpenDoor

    def ask(self, policy: str) -> tuple[httpx.Response, str, float]:
        """The reply, the attempt, and the seconds that it took."""
        lease = self.door.lease()
        begun = time.monotonic()
        reply = httpx.post(
            f"{self.door.url}/a/{lease.capability}/v1/chat/completions",
            json={"model": policy, "messages": []},
            timeout=60,
        )
        return reply, lease.attempt_id, time.monotonic() - begun


@pytest.fixture(scope="module")
def bad(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bad]:
    with (
        upstream(ANSWERS["garbage"]) as garbage,
        upstream(ANSWERS["cut"]) as cut,
        upstream(ANSWERS["no json"]) as no_json,
        upstream(ANSWERS["closed"]) as closed,
        upstream(None) as hangs,
    ):
        urls = {"garbage": garbage, "cut": cut, "nojson": no_json, "closed": closed}
        urls |= {"hangs": hangs, "nobody": f"{NOBODY}/v1"}
        config = GatewayConfig(
            call_timeout_s=LIMIT_S,
            roles={name: RoleConfig(policy=name, model=name) for name in urls},
        )
        answerers = [
            upstream_answerer(
                PolicyConfig(name, train=False, upstream=UpstreamConfig(url, name, None, 1.0, 1.0))
            )
            for name, url in urls.items()
        ]
        roles = make_roles(config, "garbage", list(urls))
        with open_door(tmp_path_factory.mktemp("door"), config, answerers, roles) as door:
            yield Bad(door)


@pytest.mark.parametrize("policy", ["garbage", "closed", "nobody", "cut"])
def test_an_upstream_that_does_not_answer_is_a_502_at_once(bad: Bad, policy: str) -> None:
    reply, _, seconds = bad.ask(policy)
    assert reply.status_code == 502 and seconds < LIMIT_S
    assert "did not answer" in reply.json()["error"]["message"]
    assert reply.headers["retry-after"] == "1"


def test_an_upstream_that_hangs_is_a_504_at_the_limit(bad: Bad) -> None:
    reply, _, seconds = bad.ask("hangs")
    assert reply.status_code == 504 and LIMIT_S - 1 < seconds < LIMIT_S + 10
    assert "gateway.call_timeout_s" in reply.json()["error"]["message"]


def test_what_an_upstream_says_passes_even_where_it_cannot_be_understood(bad: Bad) -> None:
    reply, attempt, _ = bad.ask("nojson")
    assert (reply.status_code, reply.content) == (200, b"<html>...")
    (row,) = bad.door.store.get([attempt]).to_pylist()
    assert json.loads(row["attributes"])["reply"] == {"text": "", "tool_calls": []}
