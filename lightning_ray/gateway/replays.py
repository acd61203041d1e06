"""Retries of a call that was answered: they get its reply, and no second sample.

A client that lost its connection, or waited too long, sends its request again; clients of OpenAI
and Anthropic count in a header how often. Without this the attempt would have two samples, of which
the agent saw one.

Invariant: only a request that says of itself that it repeats another gets a reply that was given
before, and only one of its own attempt (live: of its own conversation).
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import cast

from starlette.responses import Response, StreamingResponse

RETRY_COUNT = "x-stainless-retry-count"
IDEMPOTENCY = "idempotency-key"
REPLAYED = "x-lightning-ray-replayed"

KEPT_S = 600.0
"""How long a reply is kept, seconds; clients give up earlier."""
LARGEST = 1024 * 1024
"""A reply of more bytes is not kept."""


def repeats(headers: Mapping[str, str]) -> bool:
    """Whether a request says that it may have been sent before."""
    count = headers.get(RETRY_COUNT, "0")
    return IDEMPOTENCY in headers or (count.isdecimal() and int(count) > 0)


def name_of(whose: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """What is the same for a call and its retries, and for no others of `whose`."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (whose.encode(), path.encode(), headers.get(IDEMPOTENCY, "").encode(), body):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


@dataclass(frozen=True)
class _Given:
    """A reply that was given in full."""

    status: int
    headers: dict[str, str]
    body: bytes

    def again(self) -> Response:
        return Response(self.body, self.status, {**self.headers, REPLAYED: "true"})


@dataclass
class _Entry:
    given: "asyncio.Future[_Given | None]"
    """None when it came to no reply that can be given again."""
    since: float
    size: int = 0


class Replays:
    """The latest replies of one replica; belongs to one event loop."""

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._bytes = 0

    async def again(self, name: bytes) -> Response | None:
        """The reply to a call of this name; while it is being given, it is waited for."""
        entry = self._entries.get(name)
        if entry is None or time.monotonic() - entry.since > KEPT_S:
            return None
        given = await asyncio.shield(entry.given)
        return None if given is None else given.again()

    async def answer(
        self,
        name: bytes,
        make: Callable[[], Awaitable[Response]],
        leaving: list[Callable[[], None]],
    ) -> Response:
        """Makes the reply to a call, and keeps it once it was given in full.

        What is added to `leaving` is to be called when the client has gone.
        """
        given: asyncio.Future[_Given | None] = asyncio.get_running_loop().create_future()
        entry = _Entry(given, time.monotonic())
        self._drop(name)
        self._entries[name] = entry

        def leave() -> None:
            if not given.done():
                given.set_result(None)
            if given.result() is None and self._entries.get(name) is entry:
                self._drop(name)

        leaving.append(leave)
        reply = await make()
        if reply.status_code == 200:
            if isinstance(reply, StreamingResponse):
                parts = cast(AsyncIterator[bytes], reply.body_iterator)
                reply.body_iterator = self._collected(name, entry, _plain(reply), parts)
            else:
                self._keep(name, entry, _Given(200, _plain(reply), bytes(reply.body)))
        return reply

    async def _collected(
        self, name: bytes, entry: _Entry, headers: dict[str, str], parts: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        kept: list[bytes] = []
        size = 0
        async for part in parts:
            size += len(part)
            if size <= LARGEST:
                kept.append(part)
            yield part
        if size <= LARGEST:
            self._keep(name, entry, _Given(200, headers, b"".join(kept)))

    def _keep(self, name: bytes, entry: _Entry, given: _Given) -> None:
        if entry.given.done() or self._entries.get(name) is not entry:
            return
        if len(given.body) > min(LARGEST, self._most):
            return
        entry.given.set_result(given)
        entry.size = len(given.body)
        self._bytes += entry.size
        self._entries.move_to_end(name)
        while self._bytes > self._most or self._oldest_is_over():
            self._drop(next(iter(self._entries)))

    def _oldest_is_over(self) -> bool:
        oldest = next(iter(self._entries.values()))
        return time.monotonic() - oldest.since > KEPT_S

    def _drop(self, name: bytes) -> None:
        if (entry := self._entries.pop(name, None)) is not None:
            self._bytes -= entry.size
            if not entry.given.done():
                entry.given.set_result(None)


def _plain(reply: Response) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name != "content-length"}
