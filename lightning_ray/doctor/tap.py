"""The tap: an HTTP server between the agents and the door that passes bytes and notes what it saw.

Invariant: what passes is what came, with one exception: a model name that the door does not know is
replaced by one that it does, so that any agent can be examined before anybody has listed its names.
A request's note is taken before the agent reads the end of its answer.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from lightning_ray.doctor.exchange import (
    Asked,
    Exchange,
    count_tool_calls,
    read_error,
    read_request,
    renamed,
)
from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.intake import TOLD

log = logging.getLogger(__name__)

_START_S = 20.0
_NOTED_BYTES = 4 * 1024 * 1024
"""How much of a stream is looked at; all of it is passed on."""
# Hop by hop (RFC 9110, 7.6.1), or written anew by the server on this side.
_DROPPED = frozenset(
    {"connection", "content-length", "date", "host", "keep-alive", "server", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "expect"}
)

Resolve = Callable[[str], str | None]
"""From a capability to the attempt that it stands for, or None; may block for a moment."""


class Tap:
    """A listener of its own thread; a context manager."""

    def __init__(
        self,
        target: str,
        models: Sequence[str],
        resolve: Resolve,
        host: str = "127.0.0.1",
        call_timeout_s: float = 300.0,
    ):
        """`target` is the door's base URL, `models` the names that it answers to."""
        self._target = target
        self._models = tuple(models)
        self._resolve = resolve
        self._host = host
        self._call_timeout_s = call_timeout_s
        self._attempts: dict[str, str] = {}
        self._exchanges: list[Exchange] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tap", daemon=True)
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self.url = ""
        """In the place of the door's base URL."""

    def __enter__(self) -> "Tap":
        """Starts to listen. Raises InfrastructureError when it cannot."""
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(_START_S)
        except (OSError, TimeoutError) as error:
            raise InfrastructureError(f"the tap cannot listen on {self._host}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(_START_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_S)

    def exchanges(self, attempt_ids: Sequence[str]) -> list[Exchange]:
        """What these attempts asked of the door, in that order, without the telemetry it took."""
        wanted = set(attempt_ids)
        seen = [exchange for exchange in list(self._exchanges) if exchange.attempt_id in wanted]
        return [one for one in seen if one.path not in TOLD or not one.answered]

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._call_timeout_s + 30, sock_connect=10),
            auto_decompress=False,
            skip_auto_headers=["Accept-Encoding", "User-Agent", "Content-Type"],
        )
        # The door's own limit is what refuses a large body.
        app = web.Application(client_max_size=1 << 40)
        app.router.add_route("*", "/a/{capability}{path:/.*}", self._pass)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0, shutdown_timeout=1)
        await site.start()
        self.url = f"http://{self._host}:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        attempt_id = await self._attempt(request.match_info["capability"])
        body = await request.read()
        note = _Note(attempt_id, request.method, request.match_info["path"], read_request(body))
        # Its place is taken when it asks; it is filled in when it is answered.
        place = len(self._exchanges)
        self._exchanges.append(note.exchange(None))
        if note.asked.model is not None and note.asked.model not in self._models:
            body = renamed(body, self._models[0])
        try:
            return await self._forward(request, body, note, place)
        except _GoneError:
            # Nobody reads this; the engine has stopped, for its connection is closed.
            return web.Response(status=499)
        except aiohttp.ClientError as error:
            log.warning("the door did not answer: %s", error)
            self._exchanges[place] = note.exchange(502, b"the door did not answer")
            return web.Response(status=502, text="the door did not answer; try again")

    async def _forward(
        self, request: web.Request, body: bytes, note: "_Note", place: int
    ) -> web.StreamResponse:
        assert self._session is not None
        asking = self._session.request(
            request.method,
            self._target + request.raw_path,
            data=body or None,
            headers=[item for item in request.headers.items() if item[0].lower() not in _DROPPED],
            allow_redirects=False,
        )
        async with asking as reply:
            passed = web.StreamResponse(status=reply.status, reason=reply.reason)
            for name, value in reply.headers.items():
                if name.lower() not in _DROPPED:
                    passed.headers.add(name, value)
            passed.content_length = reply.content_length
            if reply.content_length is not None:
                whole = await reply.read()
                self._exchanges[place] = note.exchange(reply.status, whole)
                await _to_agent(passed.prepare(request))
                await _to_agent(passed.write(whole))
                return passed
            await _to_agent(passed.prepare(request))
            seen = bytearray()
            async for part in reply.content.iter_any():
                seen += part[: _NOTED_BYTES - len(seen)]
                # As far as it went, should the agent leave now.
                self._exchanges[place] = note.exchange(reply.status, bytes(seen), parse=False)
                await _to_agent(passed.write(part))
            self._exchanges[place] = note.exchange(reply.status, bytes(seen))
            await _to_agent(passed.write_eof())
            return passed

    async def _attempt(self, capability: str) -> str:
        if capability not in self._attempts:
            found = await asyncio.to_thread(self._resolve, capability)
            if found is None:
                return ""
            self._attempts[capability] = found
        return self._attempts[capability]


class _GoneError(Exception):
    """The agent went away."""


async def _to_agent(writing: Awaitable[Any]) -> None:
    # aiohttp has one error for both sides of a proxy that lose their connection.
    try:
        await writing
    except ConnectionResetError as error:
        raise _GoneError from error


class _Note:
    """A request whose answer is on its way."""

    def __init__(self, attempt_id: str, method: str, path: str, asked: Asked):
        self._about = (attempt_id, method, path)
        self.asked = asked

    def exchange(self, status: int | None, body: bytes = b"", parse: bool = True) -> Exchange:
        """What is known so far; without `parse` the body is not looked at yet."""
        if status is None or not parse:
            return Exchange(*self._about, self.asked, status)
        good = 200 <= status < 300
        return Exchange(
            *self._about,
            self.asked,
            status,
            error="" if good else read_error(body),
            tool_calls=count_tool_calls(body) if good else 0,
        )
