import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from lightning_ray.inference import Attribution, attribution_headers
from lightning_ray.inference.attribution import (
    AttributionMiddleware,
    Receive,
    Scope,
    Send,
    current_attribution,
)

WHO = Attribution("run", "rollout", "rollout/1", "gpt-4o-mini", "/v1/messages")


class App:
    """An application that notes whom it answered and which headers it was shown."""

    def __init__(self, error: Exception | None = None) -> None:
        self.seen: list[tuple[str, Attribution | None, dict[str, str]]] = []
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope.get("headers", [])}
        await asyncio.sleep(0)
        self.seen.append((scope["type"], current_attribution.get(), headers))
        if self._error is not None:
            raise self._error


def scope(headers: dict[str, str], kind: str = "http") -> Scope:
    return {
        "type": kind,
        "path": "/v1/messages",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }


async def sent(app: AttributionMiddleware, request: Scope) -> list[MutableMapping[str, Any]]:
    messages: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    await app(request, receive, send)
    return messages


def test_a_handler_knows_whose_call_it_answers_and_sees_none_of_our_headers() -> None:
    app = App()
    headers = {**attribution_headers("key", WHO), "content-type": "application/json"}
    asyncio.run(sent(AttributionMiddleware(app, "key"), scope(headers)))
    assert app.seen == [("http", WHO, {"content-type": "application/json"})]


def test_a_caller_with_the_key_and_no_attempt_is_answered_unattributed() -> None:
    app = App()
    asyncio.run(sent(AttributionMiddleware(app, "key"), scope({"x-lightning-ray-key": "key"})))
    assert app.seen == [("http", None, {})]


@pytest.mark.parametrize(
    "headers", [{}, {"x-lightning-ray-key": "guess"}, {"authorization": "key"}]
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_stranger_is_refused(headers: dict[str, str], kind: str) -> None:
    app = App()
    forged = {**attribution_headers("", WHO), "x-lightning-ray-key": "", **headers}
    messages = asyncio.run(sent(AttributionMiddleware(app, "key"), scope(forged, kind)))
    assert app.seen == []
    if kind == "http":
        assert messages[0]["status"] == 401 and b"gateway only" in messages[1]["body"]
    else:
        assert messages == [{"type": "websocket.close", "code": 1008}]


def test_the_servers_own_start_passes() -> None:
    app = App()
    asyncio.run(sent(AttributionMiddleware(app, "key"), {"type": "lifespan"}))
    assert [kind for kind, _, _ in app.seen] == ["lifespan"]


@pytest.mark.parametrize("error", [None, RuntimeError("a handler failed")])
def test_the_attribution_ends_with_the_call(error: Exception | None) -> None:
    app = App(error)
    middleware = AttributionMiddleware(app, "key")

    async def main() -> None:
        # One task, as a server uses for the calls of one connection.
        try:
            await sent(middleware, scope(attribution_headers("key", WHO)))
        except RuntimeError as raised:
            assert raised is error
        assert current_attribution.get() is None

    asyncio.run(main())
    assert app.seen[0][1] == WHO


def test_calls_at_the_same_time_are_not_mixed_up() -> None:
    app = App()
    middleware = AttributionMiddleware(app, "key")
    many = [Attribution("run", f"r{n}", f"r{n}/1", "m", "/v1/messages") for n in range(50)]

    async def main() -> None:
        requests = [scope(attribution_headers("key", who) | {"n": who.rollout_id}) for who in many]
        await asyncio.gather(*(sent(middleware, request) for request in requests))

    asyncio.run(main())
    assert len(app.seen) == 50
    assert all(who is not None and who.rollout_id == shown["n"] for _, who, shown in app.seen)
