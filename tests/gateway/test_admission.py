"""Calls that go ahead of the queue's answer: when they may, and what becomes of them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway import admission
from lightning_ray.gateway.admission import Attempts, NotAdmittedError
from lightning_ray.rollouts import Identity, RosterReader
from lightning_ray.rollouts.capabilities import digest
from lightning_ray.rollouts.roster import Roster

WHO = Identity("run", "r", "r/1")


class Queue:
    """A line to the queue whose answers come when the test gives them."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Identity | None]] = []

    def resolve(self, capability: str) -> "asyncio.Future[Identity | None]":
        self.asked.append(asyncio.get_running_loop().create_future())
        return self.asked[-1]


def played(play: Callable[[Queue, Attempts], Awaitable[Any]]) -> None:
    async def run() -> None:
        queue = Queue()
        async with asyncio.timeout(20):
            await play(queue, Attempts(queue))  # type: ignore[arg-type]

    asyncio.run(run())


async def let_in_once(queue: Queue, attempts: Attempts) -> None:
    first = attempts.ask("capability")
    assert first.expected is None
    queue.asked[-1].set_result(WHO)
    assert await first.identity() == WHO
    await turns()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_reply_that_comes_before_the_yes_waits_for_it() -> None:
    async def play(queue: Queue, attempts: Attempts) -> None:
        await let_in_once(queue, attempts)
        ahead = attempts.ask("capability")
        assert ahead.expected == WHO
        began = asyncio.Event()

        async def answer() -> Response:
            began.set()
            return Response(b"said")

        given = asyncio.create_task(ahead.meanwhile(answer()))
        await began.wait()
        await turns()
        assert not given.done()
        queue.asked[-1].set_result(WHO)
        assert (await given).body == b"said"

    played(play)


def test_who_is_seen_in_the_roster_is_let_in_without_a_question(tmp_path: Path) -> None:
    async def play(queue: Queue, attempts: Attempts) -> None:
        roster = Roster(tmp_path / "running")
        seat = roster.take(digest("capability"))
        attempts.look_at(RosterReader(tmp_path / "running"))

        async def answer() -> Response:
            return Response(b"said")

        # Unknown so far: only the queue knows whom a capability stands for.
        first = attempts.ask("capability")
        queue.asked[-1].set_result(replace(WHO, seat=seat))
        assert await first.identity() == WHO
        await turns()
        for _ in range(3):
            reply = await attempts.ask("capability").meanwhile(answer())
            assert reply.body == b"said"
        assert len(queue.asked) == 1
        roster.leave(seat)
        late = asyncio.create_task(attempts.ask("capability").meanwhile(answer()))
        await turns()
        assert len(queue.asked) == 2 and not late.done()
        queue.asked[-1].set_result(None)
        with pytest.raises(NotAdmittedError):
            await late
        # Whoever has the seat next is somebody else.
        assert roster.take(digest("another")) == seat
        attempts.ask("capability")
        assert len(queue.asked) == 3

    played(play)


@pytest.mark.parametrize("other", [None, Identity("run", "r", "r/2")])
def test_a_no_ends_what_was_begun_and_nothing_goes_ahead_again(other: Identity | None) -> None:
    async def play(queue: Queue, attempts: Attempts) -> None:
        await let_in_once(queue, attempts)
        ahead = attempts.ask("capability")
        ended = asyncio.Event()

        async def answer() -> Response:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            return Response()

        given = asyncio.create_task(ahead.meanwhile(answer()))
        await turns()
        queue.asked[-1].set_result(other)
        with pytest.raises(NotAdmittedError):
            await given
        await ended.wait()
        assert attempts.ask("capability").expected == other

    played(play)


def test_a_no_comes_before_the_engines_own_error_and_after_its_reply() -> None:
    async def play(queue: Queue, attempts: Attempts) -> None:
        async def fail() -> Response:
            raise ValueError("the engine's")

        async def answer() -> Response:
            return Response(b"said")

        for work in (fail, answer):
            await let_in_once(queue, attempts)
            ahead = attempts.ask("capability")
            given = asyncio.create_task(ahead.meanwhile(work()))
            await turns()
            queue.asked[-1].set_result(None)
            with pytest.raises(NotAdmittedError):
                await given
        await let_in_once(queue, attempts)
        ahead = attempts.ask("capability")
        queue.asked[-1].set_result(WHO)
        with pytest.raises(ValueError, match="engine"):
            await ahead.meanwhile(fail())

    played(play)


def test_a_client_that_leaves_ends_the_work_and_a_queue_that_is_gone_is_told() -> None:
    async def play(queue: Queue, attempts: Attempts) -> None:
        await let_in_once(queue, attempts)
        for leaves in (True, False):
            ahead = attempts.ask("capability")
            ended = asyncio.Event()

            async def answer(ended: asyncio.Event = ended) -> Response:
                try:
                    await asyncio.sleep(60)
                finally:
                    ended.set()
                return Response()

            given = asyncio.create_task(ahead.meanwhile(answer()))
            await turns()
            if leaves:
                given.cancel()
            else:
                queue.asked[-1].set_exception(InfrastructureError("no queue"))
            with pytest.raises(asyncio.CancelledError if leaves else InfrastructureError):
                await given
            await ended.wait()

    played(play)


def test_what_was_said_long_ago_or_of_others_lets_nobody_go_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play(queue: Queue, attempts: Attempts) -> None:
        await let_in_once(queue, attempts)
        assert attempts.ask("other").expected is None
        monkeypatch.setattr(admission, "KNOWN_S", 0.0)
        assert attempts.ask("capability").expected is None
        monkeypatch.setattr(admission, "KNOWN_S", 30.0)
        assert attempts.ask("capability").expected == WHO
        monkeypatch.setattr(admission, "MOST", 1)
        newer = attempts.ask("newer")
        queue.asked[-1].set_result(WHO)
        await newer.identity()
        await turns()
        assert attempts.ask("newer").expected == WHO
        assert attempts.ask("capability").expected is None

    played(play)


def test_what_lets_nobody_go_ahead_any_more_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(queue: Queue, attempts: Attempts) -> None:
        await let_in_once(queue, attempts)
        monkeypatch.setattr(admission, "KNOWN_S", 0.05)
        await asyncio.sleep(0.1)
        newer = attempts.ask("newer")
        queue.asked[-1].set_result(WHO)
        await newer.identity()
        await turns()
        monkeypatch.setattr(admission, "KNOWN_S", 30.0)
        assert attempts.ask("capability").expected is None
        assert attempts.ask("newer").expected == WHO

    played(play)
