"""How a replica of the door hears HTTP, without Ray: whose calls end, and who may listen."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lightning_ray.gateway.listener import Listener

REQUEST = b"POST / HTTP/1.1\r\nhost: door\r\ncontent-length: 2\r\n\r\n{}"
LIMIT_S = 10.0


class Calls:
    """An application that answers when it is told to, and notes how its calls ended."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.answer = asyncio.Event()
        self.ended: list[str] = []
        self.over = asyncio.Event()

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        message = await receive()
        assert message["body"] == b"{}"
        self.begun.set()
        try:
            await self.answer.wait()
            headers = [(b"content-length", b"4")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"done"})
            # A call may have something to do once it is answered.
            await asyncio.sleep(0.05)
            self.ended.append("answered")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        finally:
            self.over.set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_calls(test: Callable[[Calls, int], Awaitable[None]]) -> None:
    """Runs a test beside a listener on a port of its own."""

    async def run() -> None:
        calls, port = Calls(), free_port()
        listener = Listener(calls, "127.0.0.1", port, shared=False)
        async with asyncio.timeout(LIMIT_S):
            await test(calls, port)
        listener.check()
        listener.close()

    asyncio.run(run())


def test_a_caller_who_goes_away_ends_its_call() -> None:
    async def test(calls: Calls, port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        await calls.begun.wait()
        writer.close()
        await calls.over.wait()
        assert calls.ended == ["cancelled"]

    with_calls(test)


def test_an_answered_call_runs_to_its_end_and_the_connection_is_kept() -> None:
    async def test(calls: Calls, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        calls.answer.set()
        for number in (1, 2):
            calls.over.clear()
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ") and await reader.readexactly(4) == b"done"
            await calls.over.wait()
            assert calls.ended == ["answered"] * number
        writer.close()

    with_calls(test)


def test_a_port_is_one_listeners_alone_unless_replicas_share_it() -> None:
    async def run() -> None:
        first = free_port()
        alone = Listener(Calls(), "127.0.0.1", first, shared=False)
        with pytest.raises(OSError, match="in use"):
            Listener(Calls(), "127.0.0.1", first, shared=True)
        second = free_port()
        both = [Listener(Calls(), "127.0.0.1", second, shared=True) for _ in range(2)]
        for one in (alone, *both):
            one.close()

    asyncio.run(run())


def test_a_listener_that_has_ended_is_not_well() -> None:
    async def run() -> None:
        listener = Listener(Calls(), "127.0.0.1", free_port(), shared=False)
        await asyncio.sleep(0.1)
        listener.check()
        listener.close()
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    listener.check()
                except RuntimeError as error:
                    assert "no longer listens" in str(error)
                    return
                await asyncio.sleep(0.02)

    asyncio.run(run())
