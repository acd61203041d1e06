"""The door: one Ray Serve application that every agent speaks to.

It finds out who is calling (the capability in the path), which policy answers (the model name), and
passes bytes to an engine and back. Replies are not parsed or rebuilt: what the agent reads is what
the engine's own handler wrote. An attempt's calls stay on one engine, for its prefix cache.
"""

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from ray import serve
from ray.actor import ActorHandle
from starlette.responses import Response, StreamingResponse

from lightning_ray.gateway.config import GatewayConfig
from lightning_ray.gateway.protocols import CALLS, LISTINGS, error_body, requested_model
from lightning_ray.inference import Attribution, attribution_headers
from lightning_ray.rollouts import Identity

log = logging.getLogger(__name__)

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

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class _Refusal(Exception):
    """A call that goes no further."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message


# Serve pickles the class where it is decorated, so what its methods use stands above it.


async def _relay(reply: aiohttp.ClientResponse) -> Response:
    headers = {
        name.lower(): value
        for name, value in reply.headers.items()
        if name.lower() not in _DROPPED and name.lower() != "server"
    }
    if "content-length" in reply.headers:
        async with reply:
            return Response(await reply.read(), reply.status, headers)
    return StreamingResponse(_stream(reply), reply.status, headers)


async def _stream(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    # Leaving early closes the connection, and so the engine stops generating for nobody.
    async with reply:
        async for part in reply.content.iter_any():
            yield part


def _error(path: str, status: int, message: str) -> Response:
    headers: dict[str, Any] = {"content-type": "application/json"}
    return Response(error_body(path, status, message), status, headers)


@serve.deployment(max_ongoing_requests=4096)
@serve.ingress(app)
class Gateway:
    """A replica of the door."""

    def __init__(self, config: GatewayConfig, queue: ActorHandle, urls: list[str], key: str):
        """`queue` knows which capabilities are live; `urls` and `key` reach the engines."""
        self._config = config
        self._queue = queue
        self._urls = urls
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    @app.api_route("/a/{capability}/{path:path}", methods=["GET", "POST"])
    async def call(self, capability: str, path: str, request: Request) -> Response:
        """One call of an agent, unstreamed or streamed."""
        path = "/" + path
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                return await self._forward(capability, path, request)
        except _Refusal as refusal:
            return _error(path, refusal.status, refusal.message)
        except TimeoutError:
            limit = self._config.call_timeout_s
            return _error(path, 504, f"no answer within {limit:g} s (gateway.call_timeout_s)")
        except aiohttp.ClientError as error:
            log.error("an engine did not answer: %s", error)
            return _error(path, 502, "the engine did not answer; try again")

    async def _forward(self, capability: str, path: str, request: Request) -> Response:
        identity: Identity | None = await self._queue.resolve.remote(capability)
        if identity is None:
            raise _Refusal(401, "this base URL belongs to no running attempt")
        allowed = CALLS if request.method == "POST" else LISTINGS
        if path not in allowed:
            raise _Refusal(404, f"{request.method} {path} is not served here")
        body = await self._body(request)
        role = self._role(body) if request.method == "POST" else ""
        attribution = Attribution(
            identity.run_id, identity.rollout_id, identity.attempt_id, role, path
        )
        headers = {
            name: value
            for name, value in request.headers.items()
            if name not in _DROPPED and not name.startswith(_OURS)
        }
        headers |= attribution_headers(self._key, attribution)
        url = self._urls[zlib.crc32(identity.rollout_id.encode()) % len(self._urls)] + path
        reply = await self._client().request(
            request.method, url, params=request.query_params, data=body or None, headers=headers
        )
        return await _relay(reply)

    async def _body(self, request: Request) -> bytes:
        limit = self._config.max_body_bytes
        parts = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _Refusal(413, f"the body is larger than {limit} bytes")
            parts.append(part)
        return b"".join(parts)

    def _role(self, body: bytes) -> str:
        try:
            model = requested_model(body)
        except ValueError as error:
            raise _Refusal(400, f"the body cannot be read: {error}") from error
        if model not in self._config.models:
            names = ", ".join(self._config.models)
            raise _Refusal(404, f"no model {model!r} here; the models are: {names}")
        return model

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Limits on calls are the queue's and the engine's; the pool must not add one. The total
            # holds for a stream as well, which outlives `call`.
            limit = aiohttp.ClientTimeout(total=self._config.call_timeout_s, sock_connect=10)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=limit,
                auto_decompress=False,
                # Asked for by nobody, and passed on as it came.
                skip_auto_headers=["Accept-Encoding"],
            )
        return self._session
