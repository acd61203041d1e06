"""Whose call this is: told by the gateway in headers, carried to the engine in a context variable.

An engine answers nobody who does not know its key, so that an agent cannot go round the gateway and
speak for another attempt. A context variable carries the attribution because not every vLLM handler
passes its request id on to `generate`.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

KEY_HEADER = "x-lightning-ray-key"
RUN_HEADER = "x-lightning-ray-run"
ROLLOUT_HEADER = "x-lightning-ray-rollout"
ATTEMPT_HEADER = "x-lightning-ray-attempt"
ROLE_HEADER = "x-lightning-ray-role"
PROMPT_HEADER = "x-lightning-ray-prompt"
SAMPLING_HEADER = "x-lightning-ray-sampling"
_OURS = frozenset(
    {
        KEY_HEADER,
        RUN_HEADER,
        ROLLOUT_HEADER,
        ATTEMPT_HEADER,
        ROLE_HEADER,
        PROMPT_HEADER,
        SAMPLING_HEADER,
    }
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Attribution:
    """Where a call's span belongs."""

    run_id: str
    rollout_id: str
    attempt_id: str
    role: str
    """The model name that the agent asked for, or what it was told apart by."""
    path: str
    """The protocol's path, "/v1/chat/completions" say."""
    prompt: str = ""
    """The prompt version that took the place of the agent's own, NAME@VERSION; empty for none."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What the run sets of the call's sampling, by name (`SamplingConfig`)."""


current_attribution: ContextVar[Attribution | None] = ContextVar("attribution", default=None)


class AttributionMiddleware:
    """ASGI middleware: refuses strangers, and notes whose call it is for the rest of the call."""

    def __init__(self, app: App, key: str):
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        if not hmac.compare_digest(headers.get(KEY_HEADER, b""), self._key):
            await _refuse(scope, send)
            return
        # Nothing of ours is shown to the handlers, and so to no log of theirs.
        scope["headers"] = [
            (name, value) for name, value in scope["headers"] if name.decode("latin-1") not in _OURS
        ]
        attribution = None
        if ATTEMPT_HEADER in headers:
            attribution = Attribution(
                run_id=headers[RUN_HEADER].decode(),
                rollout_id=headers[ROLLOUT_HEADER].decode(),
                attempt_id=headers[ATTEMPT_HEADER].decode(),
                role=headers.get(ROLE_HEADER, b"").decode(),
                path=scope["path"],
                prompt=headers.get(PROMPT_HEADER, b"").decode(),
                sampling=json.loads(headers.get(SAMPLING_HEADER, b"{}")),
            )
        token = current_attribution.set(attribution)
        try:
            await self._app(scope, receive, send)
        finally:
            current_attribution.reset(token)


def attribution_headers(key: str, attribution: Attribution) -> dict[str, str]:
    """The headers by which a gateway tells an engine whose call it forwards."""
    headers = {
        KEY_HEADER: key,
        RUN_HEADER: attribution.run_id,
        ROLLOUT_HEADER: attribution.rollout_id,
        ATTEMPT_HEADER: attribution.attempt_id,
        ROLE_HEADER: attribution.role,
    }
    if attribution.prompt:
        headers[PROMPT_HEADER] = attribution.prompt
    if attribution.sampling:
        headers[SAMPLING_HEADER] = json.dumps(dict(attribution.sampling))
    return headers


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        # Closed before it was accepted, which a server answers with 403.
        await send({"type": "websocket.close", "code": 1008})
        return
    body = b'{"error": {"message": "this engine answers its gateway only", "code": 401}}'
    await send(
        {
            "type": "http.response.start",
            "status": 401,
            "headers": [(b"content-type", b"application/json")],
        }
    )
    await send({"type": "http.response.body", "body": body})
