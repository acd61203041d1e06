"""Several replicas of the door at one address, on a real Ray Serve, and one of them that dies."""

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
import pytest
import ray
from doors import OpenDoor, open_door
from ray import serve
from stub_engine import REPLY, stub_engine

from lightning_ray.gateway import Answerer, GatewayConfig
from lightning_ray.rollouts import AttemptOutcome, AttemptStatus

CONNECTIONS = 40
REPLACED_WITHIN_S = 120.0


class Door:
    """Two replicas at one address, and a running attempt."""

    def __init__(self, opened: OpenDoor):
        self._opened = opened
        self._at = urlsplit(opened.url)
        self._attempt = opened.lease()
        self._path = f"/a/{self._attempt.capability}/v1/chat/completions"

    def what_is_made_of_a_failure(self) -> AttemptOutcome:
        """Should the attempt fail now."""
        failed = AttemptOutcome(AttemptStatus.FAILED, error="exit code 1")
        asking = self._opened.queue.actor.excuse.remote(self._attempt.attempt_id, failed)
        outcome: AttemptOutcome = ray.get(asking, timeout=10)
        return outcome

    def ask(self) -> bytes:
        """A call on a connection of its own. Raises OSError or HTTPException when it fails."""
        assert self._at.hostname is not None
        connection = http.client.HTTPConnection(self._at.hostname, self._at.port, timeout=30)
        body = json.dumps({"model": "gpt-4o-mini", "messages": []})
        connection.request("POST", self._path, body, {"content-type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200
        content = reply.read()
        connection.close()
        return content

    def listeners(self) -> set[int]:
        """The processes that listen at the address."""
        return {
            one.pid
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN
            and one.laddr.port == self._at.port
            and one.pid is not None
        }


@pytest.fixture(scope="module")
def door(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with stub_engine() as stub:
        answerers = [Answerer("policy", (stub.url,), "key")]
        config = GatewayConfig(num_replicas=2)
        with open_door(tmp_path_factory.mktemp("door"), config, answerers) as opened:
            yield Door(opened)


def test_every_replica_answers_at_the_one_address(door: Door) -> None:
    assert len(door.listeners()) == 2
    assert {door.ask() for _ in range(CONNECTIONS)} == {REPLY}


def test_a_replica_that_dies_is_replaced_at_the_same_address(door: Door) -> None:
    before = door.listeners()
    assert not door.what_is_made_of_a_failure().fault
    lost = min(before)
    os.kill(lost, signal.SIGKILL)
    deadline = time.monotonic() + REPLACED_WITHIN_S
    while len(now := door.listeners() - {lost}) < 2 or now == before:
        status = serve.status().applications
        assert time.monotonic() < deadline, f"not replaced: {now}, {status}"
        time.sleep(0.2)
    assert {door.ask() for _ in range(CONNECTIONS)} == {REPLY}
    # Whose call was cut off only the replica knew: a failure of what ran then is not the agent's.
    excused = door.what_is_made_of_a_failure()
    assert excused.fault and excused.error.startswith("the gateway was replaced while it ran")
