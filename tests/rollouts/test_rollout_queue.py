import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from lightning_ray.errors import UserError
from lightning_ray.rollouts import (
    RolloutsConfig,
    check_rollouts,
    check_task_policies,
    policy_of,
)
from lightning_ray.rollouts.queue import RolloutQueue
from lightning_ray.rollouts.types import (
    AttemptOutcome,
    AttemptStatus,
    Lease,
    RolloutSpec,
    RolloutStatus,
)

GOOD = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})
STOPPED = AttemptOutcome(AttemptStatus.CANCELLED)
BAD = AttemptOutcome(AttemptStatus.FAILED, error="exit code 1")


def spec(rollout_id: str, timeout_s: float = 60.0, max_attempts: int = 2) -> RolloutSpec:
    return RolloutSpec(rollout_id, "task", {}, timeout_s, max_attempts)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


async def taken(queue: RolloutQueue) -> Lease:
    lease = await queue.dequeue(0)
    assert lease is not None
    return lease


def test_many_workers_never_share_an_attempt() -> None:
    async def worker(queue: RolloutQueue, seen: list[str]) -> None:
        while (lease := await queue.dequeue(0.3)) is not None:
            seen.append(lease.attempt_id)
            await asyncio.sleep(0)
            # Every first attempt fails, every second one succeeds.
            await queue.finish(lease.attempt_id, BAD if lease.number == 1 else GOOD)

    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        seen: list[str] = []
        workers = [asyncio.create_task(worker(queue, seen)) for _ in range(20)]
        ids = [f"r{number}" for number in range(100)]
        for start in range(0, 100, 10):
            await queue.enqueue([spec(rollout_id) for rollout_id in ids[start : start + 10]])
            await asyncio.sleep(0)
        records = await queue.wait(ids, 20)
        assert [record.spec.rollout_id for record in records] == ids
        assert {record.status for record in records} == {RolloutStatus.SUCCEEDED}
        assert sorted(seen) == sorted(f"{rollout_id}/{n}" for rollout_id in ids for n in (1, 2))
        await asyncio.gather(*workers)

    run(main())


def test_rollouts_are_handed_out_in_the_order_in_which_they_were_queued() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        assert await queue.enqueue([spec("b"), spec("a")]) == 2
        assert await queue.enqueue([spec("a"), spec("c")]) == 1
        assert [(await taken(queue)).rollout_id for _ in range(3)] == ["b", "a", "c"]
        assert await queue.dequeue(0) is None

    run(main())


def test_an_idle_worker_gets_work_when_there_is_some_and_nothing_after_its_wait() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        begun = time.monotonic()
        assert await queue.dequeue(0.1) is None
        assert time.monotonic() - begun >= 0.1
        waiting = asyncio.create_task(queue.dequeue(20))
        await asyncio.sleep(0)
        await queue.enqueue([spec("a")])
        lease = await asyncio.wait_for(waiting, 1)
        assert lease is not None and lease.rollout_id == "a"
        # A rollout that is tried again wakes a worker too.
        waiting = asyncio.create_task(queue.dequeue(20))
        await asyncio.sleep(0)
        await queue.finish(lease.attempt_id, BAD)
        again = await asyncio.wait_for(waiting, 1)
        assert again is not None and again.attempt_id == "a/2"

    run(main())


def test_waiting_ends_with_the_last_rollout_asked_for() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        await queue.enqueue([spec("a"), spec("b"), spec("c")])
        leases = [await taken(queue) for _ in range(3)]
        waiting = [asyncio.create_task(queue.wait(["b", "a"], 20)) for _ in range(2)]
        for lease in leases[:2]:
            await asyncio.sleep(0.01)
            assert not waiting[0].done()
            await queue.finish(lease.attempt_id, GOOD)
        for records in await asyncio.wait_for(asyncio.gather(*waiting), 1):
            assert [record.spec.rollout_id for record in records] == ["b", "a"]
            assert records[0].outcome == GOOD

    run(main())


def test_waiting_too_long_returns_what_has_ended() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        await queue.enqueue([spec("a"), spec("b"), spec("c")])
        await queue.finish((await taken(queue)).attempt_id, GOOD)
        await queue.finish((await taken(queue)).attempt_id, BAD)
        records = await queue.wait(["c", "b", "a"], 0.05)
        assert [record.spec.rollout_id for record in records] == ["a"]
        counts = await queue.counts()
        assert (counts.queued, counts.succeeded, counts.attempts) == (2, 1, 2)

    run(main())


def test_cancelling_stops_the_agent_wakes_the_trainer_and_closes_the_door() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        await queue.enqueue([spec("a"), spec("b")])
        lease = await taken(queue)
        identity = await queue.resolve(lease.capability)
        assert identity is not None and identity.attempt_id == "a/1"
        watching = asyncio.create_task(queue.cancelled(lease.attempt_id))
        waiting = asyncio.create_task(queue.wait(["a", "b"], 20))
        await asyncio.sleep(0.01)
        assert not watching.done()
        await queue.cancel(["a", "b"])
        await asyncio.wait_for(watching, 1)
        records = await asyncio.wait_for(waiting, 1)
        assert {record.status for record in records} == {RolloutStatus.CANCELLED}
        assert await queue.resolve(lease.capability) is None
        # A worker that asks only now hears of it too, and its report changes nothing.
        await asyncio.wait_for(queue.cancelled(lease.attempt_id), 1)
        assert not await queue.finish(lease.attempt_id, GOOD)
        assert await queue.dequeue(0) is None

    run(main())


def test_no_watch_is_left_behind_by_an_attempt_that_was_reported() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        await queue.enqueue([spec("a")])
        lease = await taken(queue)
        watching = asyncio.create_task(queue.cancelled(lease.attempt_id))
        await asyncio.sleep(0)
        await queue.finish(lease.attempt_id, GOOD)
        await asyncio.wait_for(watching, 1)

    run(main())


def test_an_attempt_whose_worker_is_lost_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ray.rollouts.queue.EXPIRE_EVERY_S", 0.02)

    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig(grace_s=0.05))
        await queue.enqueue([spec("a", timeout_s=0.05)])
        lost = await taken(queue)
        watching = asyncio.create_task(queue.cancelled(lost.attempt_id))
        lease = await queue.dequeue(10)
        assert lease is not None and lease.attempt_id == "a/2"
        # Should the worker still live, it is told to stop; what it reports is too late.
        await asyncio.wait_for(watching, 1)
        assert not await queue.finish(lost.attempt_id, GOOD)
        assert await queue.finish(lease.attempt_id, GOOD)
        (record,) = await queue.wait(["a"], 1)
        assert [status for _, status in record.attempts] == [
            AttemptStatus.UNRESPONSIVE,
            AttemptStatus.SUCCEEDED,
        ]

    run(main())


def test_what_was_forgotten_may_be_asked_for_anew() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        await queue.enqueue([spec("a")])
        await queue.finish((await taken(queue)).attempt_id, GOOD)
        await queue.forget(["a"])
        with pytest.raises(KeyError):
            await queue.wait(["a"], 0.01)
        assert await queue.enqueue([spec("a")]) == 1
        await queue.finish((await taken(queue)).attempt_id, BAD)
        assert (await queue.counts()).queued == 1

    run(main())


def test_a_worker_that_retires_takes_no_attempt_with_it() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        waiting = asyncio.create_task(queue.dequeue(20, "old"))
        await asyncio.sleep(0.01)
        await queue.retire("old")
        assert await waiting is None
        await queue.enqueue([spec("a")])
        assert await queue.dequeue(0, "old") is None
        assert (await queue.dequeue(0, "new")) is not None

    run(main())


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_workers", 0), ("slots_per_worker", 0), ("max_attempts", 0), ("grace_s", 0)],
)
def test_settings_that_no_queue_can_run_with_are_refused(name: str, value: int) -> None:
    check_rollouts(RolloutsConfig())
    with pytest.raises(UserError, match=f"rollouts.{name}={value}"):
        check_rollouts(RolloutsConfig(**{name: value}))


def test_a_task_may_say_how_it_is_tried() -> None:
    config = RolloutsConfig(retry_on=["timed_out"])
    own = {"rollout": {"timeout_s": 5, "max_attempts": 4, "priority": -1, "silence_s": 2.5}}
    assert policy_of(config, 60.0, "t", own) == {
        "timeout_s": 5.0,
        "max_attempts": 4,
        "priority": -1,
        "silence_s": 2.5,
        "max_faults": 3,
        "retry_on": (AttemptStatus.TIMED_OUT,),
    }
    assert policy_of(config, 60.0, "t", {"rollout": "a word of the task"})["timeout_s"] == 60.0


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("timeout_s", 0, "above 0"),
        ("timeout_s", "5", "must be a number"),
        ("timeout_s", float("inf"), "finite"),
        ("max_attempts", 0, "at least 1"),
        ("max_attempts", 1.5, "whole number"),
        ("priority", True, "whole number"),
        ("silence", 3, "no such setting; there are timeout_s, max_attempts"),
    ],
)
def test_what_a_task_may_not_say_is_refused(name: str, value: object, wrong: str) -> None:
    with pytest.raises(UserError, match=rf"task t: rollout.{name}=.*{wrong}"):
        check_task_policies(RolloutsConfig(), [("t", {"rollout": {name: value}})])


def test_a_span_revives_a_silent_attempt_and_takes_its_rollout_out_of_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The spans come from something that says when there were some."""
    monkeypatch.setattr("lightning_ray.rollouts.queue.EXPIRE_EVERY_S", 0.02)
    monkeypatch.setattr("lightning_ray.rollouts.queue.LISTEN_EVERY_S", 0.02)

    class Spans:
        def __init__(self) -> None:
            self.news: asyncio.Queue[str] = asyncio.Queue()

        async def activity(self, since: Any, timeout_s: float) -> tuple[None, list[str]]:
            return None, [await self.news.get()]

    async def main() -> None:
        spans = Spans()
        queue = RolloutQueue("run", RolloutsConfig(), None, spans)  # type: ignore[arg-type]
        await queue.enqueue([RolloutSpec("a", "task", {}, 60.0, silence_s=0.5)])
        lease = await taken(queue)
        while (await queue.counts()).queued == 0:
            await asyncio.sleep(0.02)
        # It is still let in: what it says there is what revives it.
        assert await queue.resolve(lease.capability) is not None
        spans.news.put_nowait(lease.attempt_id)
        while (await queue.counts()).running == 0:
            await asyncio.sleep(0.02)
        assert await queue.finish(lease.attempt_id, GOOD)
        (record,) = await queue.wait(["a"], 1)
        assert record.attempts == (("a/1", AttemptStatus.SUCCEEDED),)

    run(main())


def test_while_it_is_held_nothing_is_handed_out_and_what_ran_costs_the_agent_nothing() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig())
        await queue.enqueue([spec("a", max_attempts=1), spec("b", max_attempts=1)])
        running = await queue.dequeue(0, "worker")
        assert running is not None
        watching = asyncio.create_task(queue.cancelled(running.attempt_id))
        await asyncio.sleep(0)
        await queue.hold(True)
        # Its agent is stopped, which is no outcome of the rollout.
        await asyncio.wait_for(watching, 1)
        assert not await queue.finish(running.attempt_id, STOPPED)
        assert await queue.dequeue(0.1, "worker") is None
        waiting = asyncio.create_task(queue.dequeue(10, "worker"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await queue.hold(False)
        leases = [await asyncio.wait_for(waiting, 1), await queue.dequeue(0, "worker")]
        assert {lease.attempt_id for lease in leases if lease} == {"a/2", "b/1"}
        for lease in leases:
            assert lease is not None and await queue.finish(lease.attempt_id, GOOD)
        assert {r.status for r in await queue.wait(["a", "b"], 1)} == {RolloutStatus.SUCCEEDED}

    run(main())


def test_a_worker_that_was_seen_to_die_is_lost_at_once_and_gets_nothing_more() -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig(worker_lost_s=600))
        await queue.enqueue([spec("a", max_attempts=1)])
        lost = await queue.dequeue(0, "dead")
        assert lost is not None
        assert await queue.lose("dead") == ["a/1"]
        assert await queue.dequeue(0, "dead") is None
        assert not await queue.finish(lost.attempt_id, STOPPED)
        lease = await queue.dequeue(0, "another")
        assert lease is not None and lease.attempt_id == "a/2"
        assert not await queue.finish(lost.attempt_id, GOOD)
        assert [w.worker for w in await queue.workers()] == ["another"]

    run(main())
