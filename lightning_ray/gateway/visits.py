"""One visit at the door: what it holds while it lasts, and what is measured of it.

Invariant: whatever a visit holds is let go when it is over, however it ends: answered, refused,
streamed to its end, cut off, or left by its client.
"""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from lightning_ray.gateway.meters import meters

_PLACE = "lightning_ray.visit"

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]


@dataclass
class Visit:
    """What is known of a request while it is answered."""

    policy: str = ""
    """The policy whose call it is; empty for what is no call, or was refused before."""
    role: str = ""
    path: str = ""
    """The protocol's path."""
    status: int = 0
    """The HTTP status that was answered; 0 for a client that left before."""
    first_s: float | None = None
    """Seconds until the first byte of the reply's body."""
    leaving: list[Callable[[], None]] = field(default_factory=list)
    """Done when it is over."""


def visit_of(request: Request) -> Visit:
    """The visit that a request is."""
    visit: Visit = request.scope[_PLACE]
    return visit


class Visits:
    """ASGI middleware that opens a visit for each request and ends it with the last byte."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = scope[_PLACE] = Visit()
        begun = time.perf_counter()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            elif visit.first_s is None and message.get("body"):
                visit.first_s = time.perf_counter() - begun
            await send(message)

        meters().enter()
        try:
            await self._app(scope, receive, watched)
        finally:
            meters().leave()
            for leave in visit.leaving:
                leave()
            if visit.policy:
                meters().call(visit, time.perf_counter() - begun)
