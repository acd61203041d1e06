"""Workers come while rollouts wait, and go when fewer would do, with nothing lost on the way."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from agent_support import SLEEPS, agent_in

from lightning_ray.errors import UserError
from lightning_ray.rollouts import (
    QueueClient,
    RolloutsConfig,
    RolloutSpec,
    RolloutStatus,
    WorkerGroup,
    start_queue,
)
from lightning_ray.rollouts.config import check_rollouts
from lightning_ray.spans import SpansConfig, start_store

SLOTS, MOST, IDLE_S = 2, 3, 2.0


@pytest.fixture
def parts(
    ray_cluster: None, door_url: str, tmp_path: Path
) -> Iterator[tuple[QueueClient, WorkerGroup]]:
    """An agent that sleeps for so long as its task says, and one worker of at most three."""
    agent = agent_in(tmp_path, SLEEPS, "{seconds}")
    config = RolloutsConfig(slots_per_worker=SLOTS, max_workers=MOST, idle_s=IDLE_S)
    queue = start_queue("run", config)
    store = start_store(str(tmp_path / "spans"), SpansConfig())
    workers = WorkerGroup(config, agent, queue, store, door_url)
    yield queue, workers
    workers.stop()
    store.close()
    ray.kill(queue.actor)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_workers_come_and_go_with_the_queue_and_no_rollout_is_tried_again(
    parts: tuple[QueueClient, WorkerGroup],
) -> None:
    queue, workers = parts
    assert workers.fit(queue.counts()) == 0 and workers.count == 1
    # One runs on while the others have long had nothing to do.
    seconds = {"long": 30, **{f"r{n}": 1 for n in range(20)}}
    queue.enqueue([RolloutSpec(n, n, {"seconds": s}, 60.0) for n, s in seconds.items()])
    assert workers.fit(queue.counts()) == 2 and workers.count == MOST
    assert workers.fit(queue.counts()) == 0, "there are no more than max_workers"
    names = list(seconds)
    fewest = MOST
    deadline = time.monotonic() + 90
    while len(records := queue.wait(names, 0.3)) < len(names):
        assert time.monotonic() < deadline, "the rollouts did not end"
        workers.mend()
        workers.fit(queue.counts())
        fewest = min(fewest, workers.count)
    assert fewest == 1, "nobody went while one rollout was left"
    assert {record.status for record in records} == {RolloutStatus.SUCCEEDED}
    assert {len(record.attempts) for record in records} == {1}
    while len(queue.workers()) > 1:
        assert time.monotonic() < deadline, "those that left are still known to the queue"
        workers.mend()
        time.sleep(0.2)
    # Who is left takes work again, and others come again.
    queue.enqueue([RolloutSpec(f"again{n}", "t", {"seconds": 0}, 60.0) for n in range(8)])
    assert workers.fit(queue.counts()) >= 1
    again = queue.wait([f"again{n}" for n in range(8)], 40)
    assert [record.status for record in again] == [RolloutStatus.SUCCEEDED] * 8


def test_those_that_go_do_so_only_after_a_while(parts: tuple[QueueClient, WorkerGroup]) -> None:
    queue, workers = parts
    queue.enqueue([RolloutSpec(f"r{n}", "t", {"seconds": 0}, 60.0) for n in range(6)])
    assert workers.fit(queue.counts(), now=0.0) == 2
    assert len(queue.wait([f"r{n}" for n in range(6)], 40)) == 6
    empty = queue.counts()
    assert workers.fit(empty, now=10.0) == 0
    queue.enqueue([RolloutSpec(f"more{n}", "t", {"seconds": 30}, 60.0) for n in range(6)])
    busy = queue.counts()
    # They were needed again in between: the while begins anew.
    assert workers.fit(busy, now=11.0) == 0
    assert workers.fit(empty, now=11.5 + IDLE_S) == 0
    assert workers.fit(empty, now=11.6 + 2 * IDLE_S) == -2


def test_there_cannot_be_fewer_at_most_than_at_least() -> None:
    with pytest.raises(UserError, match=r"rollouts.max_workers=2: must be 0, or at least .*=3"):
        check_rollouts(RolloutsConfig(num_workers=3, max_workers=2))
    check_rollouts(RolloutsConfig(num_workers=3, max_workers=0))
