"""What is told at the door beside model calls: telemetry and rewards, and where it belongs.

Invariant: what comes through an attempt's address lands in that attempt, and what comes with a key
lands in a conversation of that key, whatever it says of itself.
"""

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from ray.actor import ActorHandle
from starlette.requests import Request
from starlette.responses import Response

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.config import GatewayConfig, ServingConfig
from lightning_ray.gateway.desk import LIVE, owner_of
from lightning_ray.gateway.given_rewards import parse_rewards
from lightning_ray.gateway.live import ROLLOUT_HEADER
from lightning_ray.gateway.protocols import error_body
from lightning_ray.gateway.telemetry import (
    BULK,
    JSON,
    RETRY_S,
    TRACES,
    TelemetryDoor,
    media_type,
    status_reply,
)
from lightning_ray.rollouts import Identity
from lightning_ray.spans import SpanClient
from lightning_ray.spans.bulk import read_bulk
from lightning_ray.spans.otlp import UndecodableError
from lightning_ray.spans.recorded import read_recorded
from lightning_ray.spans.rewards import AGENT, SERVICE
from lightning_ray.spans.telemetry import Arrived, Received, to_place

REWARDS = "/v1/rewards"
TOLD = frozenset({TRACES, BULK, REWARDS})
"""Where an attempt posts what it tells; it may until a while after its end."""

OWNER_HEADER = "x-lightning-ray-rollout-prefix"
"""On the reply to recorded spans: how the rollouts that they are in begin here."""

_LONGEST_NAME = 1024
_NAMELESS = (
    "it names no conversation: set the header {header} or {conversation}, or the attribute "
    "lightning_ray.rollout_id or gen_ai.conversation.id on the span or its resource"
)


class Intake:
    """Takes in what is told, for one replica of the door."""

    def __init__(self, config: GatewayConfig, spans: SpanClient):
        self._config = config
        self._spans = spans
        self._telemetry = TelemetryDoor(config, spans)

    async def attempt(self, path: str, identity: Identity, request: Request) -> Response:
        """Answers an attempt's POST to one of `TOLD`."""
        place = (identity.run_id, identity.rollout_id, identity.attempt_id)
        if path == REWARDS:
            return await self._rewards(place, request)
        if path == BULK:
            limits = self._config.telemetry
            return await self._telemetry.bulk(
                request.headers,
                request.stream(),
                lambda body: read_bulk(body, limits, place, AGENT),
            )

        async def placed(received: Received) -> tuple[list[dict[str, Any]], Counter[str]]:
            return to_place(received.spans, *place), Counter()

        return await self._telemetry.traces(request.headers, request.stream(), AGENT, placed)

    async def live(
        self, caller: str, desk: ActorHandle, serving: ServingConfig, run_id: str, request: Request
    ) -> Response:
        """Answers a POST of traces by a caller with a key."""
        named = None
        if (rollout := request.headers.get(ROLLOUT_HEADER)) is not None:
            named = f"rollout:{rollout}"
        elif (conversation := request.headers.get(serving.conversation_header)) is not None:
            named = f"header:{conversation}"
        nameless = _NAMELESS.format(header=ROLLOUT_HEADER, conversation=serving.conversation_header)

        async def placed(received: Received) -> tuple[list[dict[str, Any]], Counter[str]]:
            return await _in_conversations(
                received, named, nameless, caller, desk.locate.remote, run_id
            )

        return await self._telemetry.traces(request.headers, request.stream(), SERVICE, placed)

    async def recorded(
        self, caller: str, policies: Collection[str], run_id: str, request: Request
    ) -> Response:
        """Answers a POST of spans that a recorder's own engine recorded, of these policies.

        The reply says in a header how the ids of its rollouts begin here, for feedback.
        """
        limits, owner = self._config.telemetry, owner_of(caller)
        reply = await self._telemetry.bulk(
            request.headers,
            request.stream(),
            lambda body: read_recorded(body, limits, run_id, LIVE, owner, policies, SERVICE),
        )
        reply.headers[OWNER_HEADER] = owner
        return reply

    async def _rewards(self, place: tuple[str, str, str], request: Request) -> Response:
        try:
            given = parse_rewards(await self._parsed(request))
            await self._spans.append([one.span(*place) for one in given])
        except _TooLargeError:
            limit = self._config.max_body_bytes
            return _error(413, f"the body is larger than {limit} bytes (gateway.max_body_bytes)")
        except ValueError as error:
            return _error(400, str(error))
        except InfrastructureError:
            return _error(503, "the rewards could not be stored; try again")
        return Response(json.dumps({"kept": len(given)}), media_type=JSON)

    async def _parsed(self, request: Request) -> Any:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self._config.max_body_bytes:
                raise _TooLargeError
            parts.append(part)
        try:
            return json.loads(b"".join(parts))
        except RecursionError as error:
            raise UndecodableError("the body is nested too deeply") from error
        except ValueError as error:
            raise UndecodableError(f"the body is no JSON: {error}") from error


class _TooLargeError(Exception):
    """A body over the limit."""


async def _in_conversations(
    received: Received,
    named: str | None,
    nameless: str,
    caller: str,
    locate: Callable[..., Awaitable[tuple[dict[str, str], dict[str, str]]]],
    run_id: str,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of the spans whose conversation is known and the caller's.

    `named` holds for all of them. A rollout id is a span's own; a conversation's name is its
    trace's, for of the spans of a trace often only some carry it.
    """
    traces: dict[str, str] = {}
    for arrived in received.spans:
        traces[arrived.trace_id] = traces.get(arrived.trace_id) or named or _said(arrived)
    names = {name for arrived in received.spans if (name := named or _rollout(arrived))}
    by_name, by_trace = await locate(caller, sorted(names), traces)
    rows: list[dict[str, Any]] = []
    lost: Counter[str] = Counter()
    for arrived in received.spans:
        name = named or _rollout(arrived)
        rollout = by_name.get(name) if name else by_trace.get(arrived.trace_id)
        if rollout is None:
            lost["its rollout is no conversation of this key" if name else nameless] += 1
            continue
        rows += to_place([arrived], run_id, rollout, f"{rollout}/1")
    return rows, lost


def _rollout(arrived: Arrived) -> str:
    return "" if arrived.rollout_id is None else f"rollout:{arrived.rollout_id}"


def _said(arrived: Arrived) -> str:
    conversation = arrived.conversation or ""
    if conversation and len(conversation) <= _LONGEST_NAME:
        return f"header:{conversation}"
    return _rollout(arrived)


def refuse(path: str, request: Request, status: int, message: str) -> Response:
    """An error in the form that whoever posts to `path` expects."""
    if path == REWARDS:
        return _error(status, message)
    encoding = media_type(request.headers) if path == TRACES else JSON
    return status_reply(encoding, status, message)


def _error(status: int, message: str) -> Response:
    headers = {"retry-after": str(RETRY_S)} if status == 503 else {}
    return Response(error_body(REWARDS, status, message), status, headers, JSON)
