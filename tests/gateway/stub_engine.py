"""An HTTP server in place of an engine, to see which bytes pass through the door and when."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

REPLY = b'{ "id":"chatcmpl-1",\n"choices": [{"message": {"content": "\\u00fc \xc3\xbc"}}] }\n'
"""Spaced and escaped as no JSON library would do it again."""
PIECES = [
    b'data: {"delta": "1"}\n\n',
    b": ping\n\n",
    b'data: {"delta":',
    b' "2"}\n\ndata: [DONE]\n\n',
]


LARGE_PART = b"data: " + b"x" * 65_528 + b"\n\n"
LARGE_PARTS = 2000


@dataclass
class StubEngine:
    """What the stub saw; `piece` lets it send one more piece of a stream."""

    url: str = ""
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    """Method, path with query, headers and body of every request."""
    piece: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    sent: int = 0
    """Parts of the latest large stream that have left."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a caller went away before its answer was complete."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The request's header `x-test` says how to answer."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.method, request.path_qs, headers, await request.read()))
        try:
            return await self._answer(request, headers.get("x-test", ""))
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone.set()
            raise

    async def _answer(self, request: web.Request, how: str) -> web.StreamResponse:
        if how == "refuse":
            return web.Response(status=422, body=b'{"error": "mine"}', headers={"x-engine": "1"})
        if how == "cookie":
            return web.Response(body=REPLY, headers={"set-cookie": "session=1"})
        if how == "hang":
            await asyncio.sleep(60)
        if how == "large stream":
            return await self._large(request)
        if how not in ("stream", "hang in a stream", "die in a stream"):
            return web.Response(body=REPLY, content_type="application/json")
        reply = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await reply.prepare(request)
        for piece in PIECES:
            if how == "stream":
                await asyncio.to_thread(self.piece.acquire, timeout=20)
            await reply.write(piece)
        if how == "die in a stream":
            # As when the engine's process is killed: the connection is reset.
            assert request.transport is not None
            request.transport.abort()
        while how == "hang in a stream":
            await asyncio.sleep(60)
        await reply.write_eof()
        return reply

    async def _large(self, request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for number in range(LARGE_PARTS):
            self.sent = number + 1
            await reply.write(LARGE_PART)
        await reply.write_eof()
        return reply


@contextmanager
def stub_engine(stub: StubEngine | None = None) -> Iterator[Any]:
    """A stub that answers on a port of its own, from a thread of its own."""
    stub = stub or StubEngine()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", stub.answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=1)
        await site.start()
        host, port = runner.addresses[0][:2]
        stub.url = f"http://{host}:{port}"
        return runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield stub
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
