"""Passing requests and replies on: the headers that go along, and bytes as they come."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import aiohttp
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lightning_ray.gateway.answered import AnsweredCall

# Hop by hop (RFC 9110, 7.6.1), or belonging to the connection that ends here, or the agent's key.
_DROPPED = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-api-key",
    }
)
_OURS = "x-lightning-ray-"

Broken = Callable[[aiohttp.ClientError, bool], Awaitable[None]]
"""Told of an engine that broke off, before the agent can see it; and whether a part of its answer
has gone to the agent already."""


async def nobody(error: aiohttp.ClientError, lost: bool) -> None:
    """Tells nobody."""


def request_headers(request: Request) -> dict[str, str]:
    """The headers that are passed on: not ours, the agent's key, or hop by hop."""
    return {
        name: value
        for name, value in request.headers.items()
        if name not in _DROPPED and not name.startswith(_OURS)
    }


def _reply_headers(reply: aiohttp.ClientResponse) -> dict[str, str]:
    return {
        name.lower(): value
        for name, value in reply.headers.items()
        if name.lower() not in _DROPPED and name.lower() != "server"
    }


async def relay(reply: aiohttp.ClientResponse, broken: Broken = nobody) -> Response:
    """A reply as it came, whole or as a stream; `broken` is told before a stream breaks off."""
    headers = _reply_headers(reply)
    if "content-length" in reply.headers:
        async with reply:
            try:
                return Response(await reply.read(), reply.status, headers)
            except aiohttp.ClientError as error:
                await broken(error, False)
                raise
    return StreamingResponse(_stream(reply, broken), reply.status, headers)


async def recorded(
    call: AnsweredCall, reply: aiohttp.ClientResponse, broken: Broken = nobody
) -> Response:
    """Passes a reply on, and leaves a span of what was said; `broken` as in `relay`."""
    headers = _reply_headers(reply)
    if "text/event-stream" in reply.headers.get("content-type", ""):
        return StreamingResponse(_told(call.stream(reply), broken), reply.status, headers)
    async with reply:
        try:
            return Response(await call.whole(reply), reply.status, headers)
        except aiohttp.ClientError as error:
            await broken(error, False)
            raise


async def _told(parts: AsyncGenerator[bytes, None], broken: Broken) -> AsyncIterator[bytes]:
    async with aclosing(parts):
        try:
            async for part in parts:
                yield part
        except aiohttp.ClientError as error:
            await broken(error, True)
            raise


async def _stream(reply: aiohttp.ClientResponse, broken: Broken) -> AsyncIterator[bytes]:
    # Leaving early closes the connection, and so the engine stops generating for nobody.
    async with reply:
        try:
            async for part in reply.content.iter_any():
                yield part
        except aiohttp.ClientError as error:
            await broken(error, True)
            raise
