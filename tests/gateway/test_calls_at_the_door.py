"""Calls through the real door, in front of stubs: limits, retries, dead engines, metrics."""

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from doors import NOBODY, OpenDoor, open_door
from stub_engine import REPLY, StubEngine, stub_engine

from lightning_ray.gateway import Answerer, GatewayConfig
from lightning_ray.rollouts import AttemptOutcome, AttemptStatus, QueueClient, RolloutStatus
from lightning_ray.rollouts.types import Lease

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "gpt-4o-mini", "messages": []}).encode()


class Door:
    """The gateway under test and its two engines; a third is an address where nobody answers."""

    def __init__(self, door: OpenDoor, stubs: list[StubEngine], answerer: Answerer):
        self.port = door.port
        self.stubs = stubs
        self._door = door
        self._answerer = answerer
        self._attempts = 0

    def lease(self, stays_on: str | None = None) -> Lease:
        """A running attempt; of a rollout that stays on this engine, where one is given."""
        while True:
            self._attempts += 1
            name = f"called-{self._attempts}"
            if stays_on is None or self._answerer.urls_for(name)[0] == stays_on:
                return self._door.lease(name)

    def post(self, lease: Lease, how: str = "", body: bytes = BODY, **headers: str) -> Any:
        """Status, headers and body of a reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"content-type": "application/json", "x-test": how, **named}
        connection.request("POST", f"/a/{lease.capability}{CHAT}", body, sent)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, {name.lower(): v for name, v in reply.getheaders()}, content

    @property
    def queue(self) -> QueueClient:
        return self._door.queue

    def finish(self, lease: Lease) -> bool:
        """As a worker reports an agent that ended well."""
        outcome = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 0.5})
        return bool(ray.get(self.queue.actor.finish.remote(lease.attempt_id, outcome), timeout=10))

    def asked(self) -> int:
        return sum(len(stub.requests) for stub in self.stubs)


@pytest.fixture(scope="module")
def door(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    config = GatewayConfig(call_timeout_s=8.0, max_calls_per_attempt=3, max_calls=250)
    with stub_engine() as one, stub_engine() as two:
        answerer = Answerer("policy", (one.url, two.url, NOBODY), "key")
        with open_door(tmp_path_factory.mktemp("door"), config, [answerer]) as door:
            yield Door(door, [one, two], answerer)


def test_a_rollout_stays_on_its_engine_and_moves_when_that_is_dead(door: Door) -> None:
    for stub in door.stubs:
        lease, before = door.lease(stub.url), len(stub.requests)
        for _ in range(3):
            assert door.post(lease)[0] == 200
        assert len(stub.requests) - before == 3
    lease = door.lease(NOBODY)
    before = [len(stub.requests) for stub in door.stubs]
    for _ in range(3):
        assert door.post(lease)[::2] == (200, REPLY)
    moved = [len(stub.requests) - count for stub, count in zip(door.stubs, before, strict=True)]
    assert sorted(moved) == [0, 3]


def test_a_retry_gets_the_reply_of_its_call_and_another_attempt_does_not(door: Door) -> None:
    lease, before = door.lease(), door.asked()
    first = door.post(lease, x_stainless_retry_count="0")
    again = door.post(lease, x_stainless_retry_count="1")
    assert (first[0], first[2]) == (again[0], again[2]) == (200, REPLY)
    assert "x-lightning-ray-replayed" not in first[1]
    assert again[1]["x-lightning-ray-replayed"] == "true"
    assert door.asked() - before == 1
    # The same request once more is a call of its own, as long as it does not say otherwise.
    assert "x-lightning-ray-replayed" not in door.post(lease)[1]
    assert "x-lightning-ray-replayed" not in door.post(door.lease(), x_stainless_retry_count="1")[1]
    other = door.post(lease, body=BODY[:-1] + b" }", x_stainless_retry_count="1")
    assert "x-lightning-ray-replayed" not in other[1]
    assert door.asked() - before == 4


def test_a_stream_is_given_again_as_a_whole(door: Door) -> None:
    lease = door.lease()
    for stub in door.stubs:
        for _ in range(4):
            stub.piece.release()
    first = door.post(lease, "stream", idempotency_key="k")
    before = door.asked()
    again = door.post(lease, "stream", idempotency_key="k")
    assert first[2] == again[2] and b"[DONE]" in again[2]
    assert again[1]["content-type"] == first[1]["content-type"]
    assert door.asked() == before


def test_an_answer_that_its_engine_cut_off_is_no_fault_of_the_agent(door: Door) -> None:
    """Whatever the agent makes of it: the queue knew before the agent could."""
    lease = door.lease()
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        door.post(lease, "die in a stream")
    assert door.finish(lease) is True
    # It is handed out again; what went before costs the agent none of its attempts.
    again = ray.get(door.queue.actor.dequeue.remote(5), timeout=10)
    assert (again.rollout_id, again.number) == (lease.rollout_id, 2)
    assert door.post(again)[0] == 200
    assert door.finish(again) is True
    (record,) = door.queue.wait([lease.rollout_id], 5)
    assert record.status is RolloutStatus.SUCCEEDED and record.outcome is not None
    assert record.outcome.rewards == {"reward": 0.5}
    (first, _) = record.attempts
    assert first[1] is AttemptStatus.FAILED


def test_an_attempt_has_only_so_many_calls_at_a_time(door: Door) -> None:
    lease = door.lease()
    held = [threading.Thread(target=door.post, args=(lease, "hang")) for _ in range(3)]
    before = door.asked()
    for thread in held:
        thread.start()
    deadline = time.monotonic() + 6
    while door.asked() - before < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    status, headers, body = door.post(lease)
    assert status == 429 and headers["retry-after"] == "1"
    assert "gateway.max_calls_per_attempt" in json.loads(body)["error"]["message"]
    assert door.post(door.lease())[0] == 200
    for thread in held:
        thread.join(30)
    # They were ended at the limit of time, and count no longer.
    assert door.post(lease)[0] == 200


def test_two_hundred_agents_at_a_time_are_all_answered(door: Door) -> None:
    leases = [door.lease() for _ in range(200)]

    def call(lease: Lease) -> list[int]:
        return [door.post(lease)[0] for _ in range(2)]

    with ThreadPoolExecutor(200) as pool:
        answered = [status for some in pool.map(call, leases, timeout=120) for status in some]
    assert answered == [200] * 400


def test_what_happens_at_the_door_can_be_scraped(door: Door) -> None:
    assert door.post(door.lease())[0] == 200
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = (
        "ray_lightning_ray_gateway_calls_total{",
        "ray_lightning_ray_gateway_call_seconds_bucket{",
        "ray_lightning_ray_gateway_first_byte_seconds_bucket{",
        "ray_lightning_ray_gateway_requests_inside{",
    )
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(address, timeout=10) as reply:
            text = reply.read().decode()
        # Doors that were open before have theirs as well.
        ours = [
            line
            for line in text.splitlines()
            if line.startswith(wanted[0])
            and all(
                label in line
                for label in ('status="200"', CHAT, 'policy="policy"', 'role="gpt-4o-mini"')
            )
        ]
        if ours and all(name in text for name in wanted):
            break
        assert time.monotonic() < deadline, "the door's metrics were not exported in 60 s"
        time.sleep(1)
    assert all(float(one.rpartition(" ")[2]) > 0 for one in ours)
