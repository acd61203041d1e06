"""Passing a call on to who answers it: an engine of ours, or an upstream.

Invariant: a request is passed on as it came, unless a prompt version takes the place of its system
prompt or an upstream wants another model name.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import ray
from starlette.requests import Request
from starlette.responses import Response

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.answered import NotedCall
from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.config import GatewayConfig
from lightning_ray.gateway.engines import Engines
from lightning_ray.gateway.meters import meters
from lightning_ray.gateway.relay import recorded, relay, request_headers
from lightning_ray.gateway.replays import Replays, name_of, repeats
from lightning_ray.gateway.roles import Role
from lightning_ray.gateway.system_prompt import apply_prompt
from lightning_ray.gateway.upstream import (
    UpstreamCall,
    upstream_body,
    upstream_headers,
    upstream_url,
)
from lightning_ray.gateway.visits import visit_of
from lightning_ray.inference import Attribution, attribution_headers
from lightning_ray.rollouts import Identity, Line
from lightning_ray.spans import RequestLog, SpanClient

log = logging.getLogger(__name__)

BLAME_S = 10.0
"""How long the queue may take to hear that an engine failed an attempt, seconds."""


@dataclass(frozen=True)
class Call:
    """A call that may be passed on: whose, in which role, and what was sent."""

    path: str
    content: bytes
    body: dict[str, Any]
    """`content`, parsed."""
    role: Role
    identity: Identity
    answerer: Answerer
    extra: dict[str, str]
    """Headers of ours for the engine."""


class Forwarder:
    """Passes the calls of one replica on."""

    def __init__(self, config: GatewayConfig, spans: SpanClient, line: Line | None = None):
        """`spans` takes what upstreams answer; `line` is the queue's, which hears of faults."""
        self._line = line
        self._config = config
        self._spans = spans
        self._requests = RequestLog()
        self._engines = Engines(None if line is None else line.engines_of)
        self._replays = Replays(config.replay_mib * 2**20)
        self._session: aiohttp.ClientSession | None = None

    async def call(self, call: Call, request: Request) -> Response:
        """The reply to a call; a retry of one that was answered gets that answer."""
        visit = visit_of(request)
        visit.policy, visit.role, visit.path = call.role.policy, call.role.name, call.path
        path = f"{call.path}?{request.url.query}"
        name = name_of(call.identity.attempt_id, path, request.headers, call.content)
        if repeats(request.headers):
            again = await self._replays.again(name)
            if again is not None:
                meters().replayed(visit.policy, visit.role)
                return again
        return await self._replays.answer(name, lambda: self._ask(call, request), visit.leaving)

    async def models(
        self, path: str, request: Request, by: Attribution, only: Answerer
    ) -> Response:
        """What the engine says of itself to a GET."""
        headers = request_headers(request) | attribution_headers(only.key, by)
        return await relay(await self._engine("GET", only, by.rollout_id, path, headers))

    async def _ask(self, call: Call, request: Request) -> Response:
        identity = call.identity
        content, prompt = _with_prompt(call)
        by = Attribution(
            identity.run_id,
            identity.rollout_id,
            identity.attempt_id,
            call.role.name,
            call.path,
            prompt,
            identity.sampling,
        )
        if call.answerer.upstream is not None:
            body = json.loads(content) if prompt else call.body
            return await self._ask_upstream(call, body, by, request)
        headers = request_headers(request) | call.extra
        headers |= attribution_headers(call.answerer.key, by)
        noted = None
        if identity.note_messages:
            noted = NotedCall(
                self._spans, self._requests, call.role.policy, by, json.loads(content)
            )
        attempt_id = identity.attempt_id
        try:
            reply = await self._engine(
                "POST",
                call.answerer,
                identity.rollout_id,
                call.path,
                headers,
                params=request.query_params or None,
                data=content or None,
            )
        except aiohttp.ClientError as error:
            await self._blame(attempt_id, error, False)
            raise
        # Also of a reply that is not passed on in the end.
        visit_of(request).leaving.append(reply.close)
        broken = partial(self._blame, attempt_id)
        return await (relay(reply, broken) if noted is None else recorded(noted, reply, broken))

    async def _blame(self, attempt_id: str, error: aiohttp.ClientError, lost: bool) -> None:
        """Tells the queue that an engine failed an attempt, so that it is no fault of the agent."""
        if self._line is None:
            return
        what = "cut an answer off" if lost else "did not answer"
        try:
            async with asyncio.timeout(BLAME_S):
                await self._line.blame(attempt_id, f"an engine {what}: {error}", lost)
        except (InfrastructureError, ray.exceptions.RayError, TimeoutError) as failed:
            log.warning("the queue did not hear that %s met a fault: %s", attempt_id, failed)

    async def _ask_upstream(
        self, call: Call, body: dict[str, Any], by: Attribution, request: Request
    ) -> Response:
        upstream = call.answerer.upstream
        assert upstream is not None
        asked_for = body
        body = upstream_body(upstream, asked_for, by)
        headers = request_headers(request) | upstream_headers(upstream, call.path)
        asked = UpstreamCall(
            self._spans, self._requests, upstream, call.answerer.policy, by, body, asked_for
        )
        reply = await self._client().request(
            "POST",
            upstream_url(upstream, call.path),
            params=request.query_params,
            data=json.dumps(body).encode(),
            headers=headers,
        )
        return await recorded(asked, reply)

    async def _engine(
        self,
        method: str,
        answerer: Answerer,
        rollout_id: str,
        path: str,
        headers: dict[str, str],
        **options: Any,
    ) -> aiohttp.ClientResponse:
        return await self._engines.ask(
            self._client(),
            method,
            answerer,
            rollout_id,
            path,
            headers,
            self._config.engine_wait_s,
            **options,
        )

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Limits on calls are the door's and the engine's; the pool must not add one. The total
            # holds for a stream as well, which outlives the call.
            limit = aiohttp.ClientTimeout(total=self._config.call_timeout_s, sock_connect=10)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                # A cookie that came with one attempt's reply is no other's.
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=limit,
                auto_decompress=False,
                # Asked for by nobody, and passed on as it came.
                skip_auto_headers=["Accept-Encoding"],
            )
        return self._session


def own_list(roles: Sequence[Role]) -> Response:
    """The models that may be asked for, as OpenAI lists them."""
    names = dict.fromkeys(role.model for role in roles)
    models = [
        {"id": name, "object": "model", "created": 0, "owned_by": "lightning-ray"} for name in names
    ]
    listed = json.dumps({"object": "list", "data": models})
    return Response(listed, media_type="application/json")


def _with_prompt(call: Call) -> tuple[bytes, str]:
    """The request with the prompt version that is under test, and that version's label."""
    for prompt in call.identity.prompts:
        if prompt.name == call.role.policy:
            changed = apply_prompt(call.path, call.body, prompt)
            if changed is not None:
                return json.dumps(changed).encode(), prompt.label
    return call.content, ""
