"""An agent that fails while nobody answers at the door is not to blame."""

import asyncio
import socket
import threading
import time
from pathlib import Path

import pytest
import ray
from agent_support import agent_in
from door_support import listening

from lightning_ray.rollouts import (
    AttemptStatus,
    RolloutsConfig,
    RolloutSpec,
    RolloutStatus,
    WorkerGroup,
    start_queue,
)
from lightning_ray.rollouts.door import closed
from lightning_ray.spans import SpansConfig, start_store

ASKS_ONCE = """
import os, urllib.request
with open("asked", "a") as file:
    file.write("x")
urllib.request.urlopen(os.environ["OPENAI_BASE_URL"], timeout=10)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def test_a_door_that_answers_is_not_closed(door_url: str) -> None:
    assert asyncio.run(closed(door_url, 60)) == ""


def test_a_closed_door_is_waited_for_and_no_longer_than_allowed() -> None:
    port = free_port()
    begun = time.monotonic()
    why = asyncio.run(closed(f"http://127.0.0.1:{port}", 1.0))
    assert why.startswith("the gateway did not answer: ") and 1.0 <= time.monotonic() - begun < 5

    opened = threading.Event()

    def open_it() -> None:
        time.sleep(1)
        with listening(port):
            opened.wait(30)

    opening = threading.Thread(target=open_it)
    opening.start()
    begun = time.monotonic()
    assert asyncio.run(closed(f"http://127.0.0.1:{port}", 30)) != ""
    assert 1.0 <= time.monotonic() - begun < 10
    opened.set()
    opening.join(10)


@pytest.mark.timeout(120)
def test_what_fails_while_the_door_is_closed_is_tried_again_once_it_is_open(
    ray_cluster: None, tmp_path: Path
) -> None:
    """The agent is charged for none of it, and few attempts are made meanwhile."""
    agent = agent_in(tmp_path, ASKS_ONCE, warm_start=False)
    config = RolloutsConfig(slots_per_worker=2)
    queue, store = start_queue("run", config), start_store(str(tmp_path / "spans"), SpansConfig())
    port = free_port()
    workers = WorkerGroup(config, agent, queue, store, f"http://127.0.0.1:{port}")
    names = [f"r{n}" for n in range(6)]
    queue.enqueue([RolloutSpec(n, n, {}, 60.0, max_attempts=1) for n in names])
    deadline = time.monotonic() + 60
    while not (tmp_path / "asked").exists() or (tmp_path / "asked").stat().st_size < 2:
        assert time.monotonic() < deadline, "no agent was started"
        time.sleep(0.1)
    assert queue.wait(names, 3.0) == []
    with listening(port):
        records = queue.wait(names, 60.0)
    workers.stop()
    store.close()
    ray.kill(queue.actor)
    assert {record.status for record in records} == {RolloutStatus.SUCCEEDED}
    tried = [status for record in records for _, status in record.attempts]
    assert tried.count(AttemptStatus.FAILED) == config.slots_per_worker
