"""Calls that somebody else's API answers: passing them on, and recording what was said.

Invariant: the upstream's key goes to the upstream alone, never into a span, a log or a reply. Every
call that the upstream answered becomes a span, on disk before the last bytes are handed on; it has
no tokens, for none are shown.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import aiohttp

from lightning_ray.gateway.answerers import Upstream
from lightning_ray.gateway.reply_reader import Reply, ReplyReader
from lightning_ray.inference import Attribution
from lightning_ray.spans import SpanClient, SpanKind, SpanStatus, span

Json = dict[str, Any]

# What a request was about; sampling parameters are kept beside.
_SAID = ("system", "instructions", "messages", "input", "prompt", "tools")
_SAMPLING = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "n")


def upstream_url(upstream: Upstream, path: str) -> str:
    """Where a call of this path goes."""
    return upstream.base_url + path.removeprefix("/v1")


def upstream_headers(upstream: Upstream, path: str) -> dict[str, str]:
    """The upstream's key in the header that the protocol wants it in."""
    if upstream.key is None:
        return {}
    if path.startswith("/v1/messages"):
        return {"x-api-key": upstream.key}
    return {"authorization": f"Bearer {upstream.key}"}


def upstream_body(upstream: Upstream, body: Json) -> Json:
    """The request as the upstream is asked: under its own model name."""
    return body if upstream.model is None else {**body, "model": upstream.model}


# The last event of a stream in the protocols that have one.
_ENDS = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete")

_recording: set[asyncio.Task[None]] = set()


def _spawn(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _recording.add(task)
    task.add_done_callback(_recording.discard)


def _status(reply: aiohttp.ClientResponse) -> SpanStatus:
    return SpanStatus.OK if reply.status < 400 else SpanStatus.ERROR


class UpstreamCall:
    """One call while it is answered; `record` leaves its span."""

    def __init__(
        self, spans: SpanClient, upstream: Upstream, policy: str, by: Attribution, body: Json
    ):
        self._spans = spans
        self._upstream = upstream
        self._policy = policy
        self._by = by
        self._body = body
        self._start_ns = time.time_ns()
        self._first_ns: int | None = None

    async def whole(self, reply: aiohttp.ClientResponse) -> bytes:
        """An unstreamed reply's bytes, recorded."""
        content = await reply.read()
        self._first_ns = time.time_ns()
        reader = ReplyReader(streamed=False)
        reader.feed(content)
        await self._record(reader.result(), _status(reply), reply.status)
        return content

    async def stream(self, reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """A streamed reply's bytes as they come, recorded before the event that ends it."""
        reader = ReplyReader(streamed=True)
        recorded = False
        try:
            async with reply:
                async for part in reply.content.iter_any():
                    self._first_ns = self._first_ns or time.time_ns()
                    reader.feed(part)
                    if not recorded and any(end in part for end in _ENDS):
                        recorded = True
                        await self._record(reader.result(), _status(reply), reply.status)
                    yield part
            if not recorded:
                recorded = True
                await self._record(reader.result(), _status(reply), reply.status)
        finally:
            if not recorded:
                # The agent went away, and what this generator awaits now is cancelled too.
                said = reader.result()
                _spawn(self._record(said, SpanStatus.ABORTED, reply.status))

    async def _record(self, said: Reply, status: SpanStatus, http_status: int) -> None:
        attributes: Json = {
            "request": {name: self._body[name] for name in _SAID if name in self._body},
            "sampling": {name: self._body[name] for name in _SAMPLING if name in self._body},
            "reply": {"text": said.text, "tool_calls": said.tool_calls},
            "reply_id": said.reply_id,
            "upstream": self._upstream.base_url,
            "upstream_model": said.model,
            "http_status": http_status,
            "usage": {"input_tokens": said.input_tokens, "output_tokens": said.output_tokens},
            "cost_usd": self._cost(said),
        }
        if self._first_ns is not None:
            attributes["first_token_ms"] = (self._first_ns - self._start_ns) / 1e6
        if self._by.prompt:
            attributes["prompt"] = self._by.prompt
        row: Mapping[str, Any] = span(
            SpanKind.MODEL_CALL,
            self._by.path,
            run_id=self._by.run_id,
            rollout_id=self._by.rollout_id,
            attempt_id=self._by.attempt_id,
            status=status,
            start_ns=self._start_ns,
            role=self._by.role,
            policy=self._policy,
            finish_reason=said.finish_reason,
            attributes=attributes,
        )
        await self._spans.append([row])

    def _cost(self, said: Reply) -> float | None:
        """US dollars; None where the reply did not say how many tokens it took."""
        if said.input_tokens is None or said.output_tokens is None:
            return None
        return (
            said.input_tokens * self._upstream.input_per_million
            + said.output_tokens * self._upstream.output_per_million
        ) / 1e6
