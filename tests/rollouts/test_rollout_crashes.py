"""The queue's journal: what it promises when its process dies."""

import asyncio
import os
import random
import secrets
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from small_disk import SmallDisk

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    RolloutsConfig,
    RolloutSpec,
    RolloutStatus,
    start_queue,
)
from lightning_ray.rollouts.asking import ask_async
from lightning_ray.rollouts.journal import NAME, Journal, read_journal
from lightning_ray.rollouts.line import Line
from lightning_ray.rollouts.queue import RolloutQueue

GOOD = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})
BAD = AttemptOutcome(AttemptStatus.FAILED, error="exit code 1")


def spec(rollout_id: str) -> RolloutSpec:
    return RolloutSpec(rollout_id, "task", {"q": rollout_id}, 600.0, max_attempts=2)


@pytest.mark.parametrize(
    ("kills_wanted", "rollouts"), [(6, 60), pytest.param(15, 300, marks=pytest.mark.slow)]
)
def test_a_queue_that_is_killed_again_and_again_loses_and_repeats_nothing(
    ray_cluster: None, tmp_path: Path, kills_wanted: int, rollouts: int
) -> None:
    queue = start_queue("run", RolloutsConfig(worker_lost_s=600.0), tmp_path)
    actor = queue.actor
    ids = [f"r{number}" for number in range(rollouts)]
    leased: list[str] = []
    acknowledged: dict[str, AttemptOutcome] = {}
    kills = 0

    async def asked(what: str, method: Any, *arguments: Any) -> Any:
        return await ask_async(lambda: method.remote(*arguments), 60, what)

    async def client(number: int) -> None:
        while len(acknowledged) < 2 * rollouts:
            request = secrets.token_urlsafe(24)
            lease = await asked("hand out work", actor.dequeue, 0.5, f"w{number}", request)
            if lease is None:
                continue
            leased.append(lease.attempt_id)
            whom = await asked("say whose", actor.resolve, lease.capability)
            assert whom.attempt_id == lease.attempt_id
            await asyncio.sleep(random.random() * 0.2)
            # Every first attempt fails, every second one succeeds.
            outcome = BAD if lease.number == 1 else GOOD
            await asked("take a report", actor.finish, lease.attempt_id, outcome)
            acknowledged[lease.attempt_id] = outcome

    async def killer() -> None:
        nonlocal kills
        while kills < kills_wanted:
            # Spread over the work, however fast the machine is.
            while len(acknowledged) < 2 * rollouts * kills // (kills_wanted + 1):
                await asyncio.sleep(0.01)
            pid = await ask_async(
                lambda: actor.__ray_call__.remote(lambda self: os.getpid()), 60, "say who it is"
            )
            await asyncio.sleep(random.random() * 0.3)
            os.kill(pid, signal.SIGKILL)
            kills += 1

    async def main() -> None:
        await asyncio.gather(killer(), *(client(number) for number in range(16)))

    try:
        assert queue.enqueue([spec(rollout_id) for rollout_id in ids], 60) == rollouts
        asyncio.run(asyncio.wait_for(main(), 240))
        assert kills == kills_wanted
        # Nobody shared an attempt, and none was skipped.
        assert sorted(leased) == sorted(f"{rollout_id}/{n}" for rollout_id in ids for n in (1, 2))
        records = queue.wait(ids, 60)
        assert [record.spec.rollout_id for record in records] == ids
        for record in records:
            assert record.status is RolloutStatus.SUCCEEDED
            for attempt_id, status in record.attempts:
                assert status is acknowledged[attempt_id].status
        counts = queue.counts()
        assert (counts.succeeded, counts.attempts) == (rollouts, 2 * rollouts)
        assert queue.enqueue([spec(rollout_id) for rollout_id in ids]) == 0
    finally:
        ray.kill(actor)


def test_thousands_wait_at_once(ray_cluster: None) -> None:
    queue = start_queue("run", RolloutsConfig())
    actor = queue.actor
    ids = [f"r{number}" for number in range(3000)]
    try:
        queue.enqueue([spec(rollout_id) for rollout_id in ids], 60)
        waiting = [actor.wait.remote([rollout_id], 200.0) for rollout_id in ids]
        # They are all inside: what is asked after them is answered.
        assert queue.counts(60).queued == 3000
        assert ray.wait(waiting, timeout=0)[0] == []
        queue.cancel(ids, 60)
        for (record,) in ray.get(waiting, timeout=120):
            assert record.status is RolloutStatus.CANCELLED
    finally:
        ray.kill(actor)


async def _some_work(folder: Path) -> None:
    queue = RolloutQueue("run", RolloutsConfig(), str(folder))
    await queue.enqueue([spec("a"), spec("b"), spec("c")])
    lease = await queue.dequeue(0, "w", "secret")
    assert lease is not None and await queue.finish(lease.attempt_id, GOOD)
    await queue.dequeue(0, "w", "secret 2")


def test_a_torn_end_is_cut_off_and_the_rest_is_kept(tmp_path: Path) -> None:
    asyncio.run(_some_work(tmp_path))
    path = tmp_path / NAME
    whole = path.read_bytes()
    events, _, _ = read_journal(path)
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(tmp_path)
        assert journal.events == events[:-1] and journal.torn == cut - last
        assert path.read_bytes() == whole[:last]


def test_a_flipped_byte_before_the_end_is_an_error_that_says_where(tmp_path: Path) -> None:
    asyncio.run(_some_work(tmp_path))
    path = tmp_path / NAME
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    with pytest.raises(InfrastructureError, match=rf"{NAME}:1: damaged"):
        Journal(tmp_path)


def test_no_secret_is_written_and_the_same_request_gets_the_same_lease(tmp_path: Path) -> None:
    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig(), str(tmp_path))
        await queue.enqueue([spec("a")])
        lease = await queue.dequeue(0, "w", "secret")
        assert lease is not None
        content = (tmp_path / NAME).read_bytes()
        assert b"secret" not in content and lease.capability.encode() not in content
        again = RolloutQueue("run", RolloutsConfig(), str(tmp_path))
        assert await again.dequeue(0, "w", "secret") == lease
        assert (await again.counts()).attempts == 1
        assert await again.finish(lease.attempt_id, GOOD)

    asyncio.run(main())


def test_a_journal_that_has_grown_is_replaced_by_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ray.rollouts.queue.EXPIRE_EVERY_S", 0.02)
    monkeypatch.setattr("lightning_ray.rollouts.journal.COMPACT_BYTES", 2000)

    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig(), str(tmp_path))
        for number in range(40):
            await queue.enqueue([spec(f"r{number}")])
            lease = await queue.dequeue(0, "w")
            assert lease is not None
            await queue.finish(lease.attempt_id, GOOD)
            await queue.forget([f"r{number}"])
        await queue.enqueue([spec("left")])
        async with asyncio.timeout(20):
            # Less than it takes for another snapshot may have come since the last one.
            while (tmp_path / NAME).stat().st_size >= 3000:
                await asyncio.sleep(0.02)
        await queue.enqueue([spec("later")])
        again = RolloutQueue("run", RolloutsConfig(), str(tmp_path))
        assert await again.counts() == await queue.counts()
        assert [(await again.dequeue(0)).rollout_id for _ in range(2)] == ["left", "later"]

    asyncio.run(main())


def test_a_new_session_takes_up_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    async def main() -> None:
        await _some_work(tmp_path)
        queue = RolloutQueue("run", RolloutsConfig(), str(tmp_path))
        await queue.begin()
        assert await queue.dequeue(0) is None
        assert (await queue.counts()).queued == 0

    asyncio.run(main())


def test_what_a_lost_worker_ran_is_a_fault_and_a_worker_shows_its_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_ray.rollouts.queue.EXPIRE_EVERY_S", 0.02)

    async def main() -> None:
        queue = RolloutQueue("run", RolloutsConfig(worker_lost_s=0.3))
        await queue.enqueue([RolloutSpec("a", "task", {}, 600.0, max_attempts=1)])
        await queue.beat("idle")
        lost = await queue.dequeue(0, "w")
        assert lost is not None
        watching = asyncio.create_task(queue.cancelled(lost.attempt_id))
        assert {w.worker: w.state for w in await queue.workers()} == {"idle": "idle", "w": "busy 1"}
        # The agent's only attempt is not spent by it.
        lease = await queue.dequeue(20, "other")
        assert lease is not None and lease.attempt_id == "a/2"
        assert {w.worker: w.state for w in await queue.workers()}["w"] == "lost"
        await asyncio.wait_for(watching, 5)
        assert await queue.finish(lease.attempt_id, GOOD)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_queue_on_a_full_disk_forgets_nothing_that_it_answered(
    ray_cluster: None, small_disk: SmallDisk
) -> None:
    queue = start_queue("run", RolloutsConfig(), small_disk.folder / "rollouts")
    try:
        assert queue.enqueue([spec("first")]) == 1
        large = RolloutSpec("large", "task", {"q": "x" * 400_000}, 60.0)
        with pytest.raises(InfrastructureError, match=r"did not queue .* No space left on device"):
            queue.enqueue([large], timeout_s=8)
        small_disk.resize("4m")
        # Whether the call that was given up came through meanwhile or not, it is queued once.
        queue.enqueue([spec("first"), large], timeout_s=60)
        assert queue.counts().queued == 2
    finally:
        ray.kill(queue.actor)


def test_a_report_waits_until_the_disk_has_room_for_it(
    ray_cluster: None, small_disk: SmallDisk
) -> None:
    queue = start_queue("run", RolloutsConfig(), small_disk.folder / "rollouts")
    filler = small_disk.folder / "filler"

    async def report(line: Line) -> None:
        await line.enqueue([spec("first")])
        lease = await line.dequeue(10, "w", "request")
        assert lease is not None
        with suppress(OSError):
            filler.write_bytes(b"x" * 300_000)
        # More than what is left of the journal's last page.
        outcome = AttemptOutcome(AttemptStatus.SUCCEEDED, result="x" * 10_000)
        reporting = asyncio.ensure_future(line.finish(lease.attempt_id, outcome))
        await asyncio.sleep(3)
        assert not reporting.done()
        filler.unlink()
        assert await reporting

    try:
        asyncio.run(asyncio.wait_for(report(Line(queue.actor)), 90))
        assert queue.counts().succeeded == 1
    finally:
        ray.kill(queue.actor)
