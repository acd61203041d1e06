"""Calls to the queue that share messages, on a real actor."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from killing import kill_and_wait

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    QueueClient,
    RolloutsConfig,
    RolloutSpec,
    asking,
    start_queue,
)
from lightning_ray.rollouts.asking import ask, ask_async
from lightning_ray.rollouts.line import Line

GOOD = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})


@pytest.fixture
def queue(ray_cluster: None, tmp_path: Path) -> Iterator[QueueClient]:
    client = start_queue("run", RolloutsConfig(), tmp_path)
    yield client
    ray.kill(client.actor)


def test_concurrent_calls_each_get_their_own_answer(queue: QueueClient) -> None:
    async def live(line: Line, number: int) -> tuple[str, bool, bool]:
        assert await line.enqueue([RolloutSpec(f"r{number}", "task", {}, 60.0)]) == 1
        lease = await line.dequeue(30, "worker", f"request-{number}")
        assert lease is not None
        first = await line.finish(lease.attempt_id, GOOD)
        return lease.attempt_id, first, await line.finish(lease.attempt_id, GOOD)

    async def run() -> None:
        line = Line(queue.actor)
        done = await asyncio.gather(*(live(line, number) for number in range(100)))
        # Nobody shares an attempt, every report counts once, and a late one does not.
        assert sorted(attempt for attempt, _, _ in done) == sorted(f"r{n}/1" for n in range(100))
        assert all(first and not again for _, first, again in done)

    asyncio.run(run())
    assert queue.counts().succeeded == 100


def test_who_waits_for_work_keeps_nobody_waiting(queue: QueueClient) -> None:
    async def run() -> None:
        line = Line(queue.actor)
        waiting = asyncio.create_task(line.dequeue(60, "worker", "first"))
        assert await line.dequeue(0, "worker", "second") is None
        await asyncio.sleep(0.2)
        async with asyncio.timeout(30):
            assert await line.enqueue([RolloutSpec("r", "task", {}, 60.0)]) == 1
            lease = await waiting
        assert lease is not None and lease.attempt_id == "r/1"

    asyncio.run(run())


def test_a_call_that_raises_costs_the_others_nothing(queue: QueueClient) -> None:
    async def run() -> None:
        line = Line(queue.actor)
        spec = RolloutSpec("r", "task", {}, 60.0)
        wrong, new = await asyncio.gather(
            line.enqueue(["no rollout"]),  # type: ignore[list-item]
            line.enqueue([spec]),
            return_exceptions=True,
        )
        assert isinstance(wrong, AttributeError) and new == 1

    asyncio.run(run())


def test_a_queue_that_is_gone_is_said_to_every_caller(queue: QueueClient) -> None:
    async def run() -> None:
        line = Line(queue.actor, timeout_s=20)
        kill_and_wait(queue.actor)
        calls = [line.finish(f"r{number}/1", GOOD) for number in range(3)]
        said = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in said] == [InfrastructureError] * 3

    asyncio.run(run())


def test_a_queue_whose_memory_was_needed_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ray.exceptions.OutOfMemoryError("the node is low on memory"), 3])

    def get(*_: object, **__: object) -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    assert ask(lambda: None, 30.0, "count") == 3  # type: ignore[arg-type,return-value]


def test_a_call_that_is_never_answered_is_made_again(
    queue: QueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the door's own time as well, which is as long as one try may be.
    monkeypatch.setattr(asking, "TRY_S", 2.0)
    queue.enqueue([RolloutSpec("r", "task", {}, 60.0)])

    def calls() -> Callable[[], ray.ObjectRef]:
        # What Ray does to a call that meets its actor's death: no answer, and no error either.
        first = iter([queue.actor.cancelled.remote("r/1")])
        return lambda: next(first, None) or queue.actor.counts.remote()

    async def run() -> None:
        lease = await queue.actor.dequeue.remote(10)
        assert lease.attempt_id == "r/1"
        assert (await ask_async(calls(), 2, "count rollouts")).running == 1
        assert ask(calls(), 30, "count rollouts").running == 1
        # Whoever watches an attempt asks again, and hears when it is over.
        assert await queue.actor.cancelled.remote("r/1", 0.2) is False
        with pytest.raises(InfrastructureError, match="did not end the attempt within 2 s"):
            await ask_async(lambda: queue.actor.cancelled.remote("r/1"), 2, "end the attempt")
        with pytest.raises(InfrastructureError, match="did not end the attempt within 2 s"):
            ask(lambda: queue.actor.cancelled.remote("r/1"), 2, "end the attempt")
        # What the queue may keep on purpose is not asked again in the meantime.
        asked = []

        def work() -> ray.ObjectRef:
            asked.append(1)
            return queue.actor.dequeue.remote(2.0)

        assert await ask_async(work, 30, "hand out work", 2.0) is None
        assert len(asked) == 1

    asyncio.run(run())
