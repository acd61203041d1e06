"""A call while it is answered: its reply is read beside the bytes that pass, and leaves a span.

Invariant: the span is on disk before the last bytes are handed on, and a reply is passed on byte
for byte, whatever was understood of it.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import aiohttp

from lightning_ray.gateway.reply_reader import Reply, ReplyReader
from lightning_ray.inference import Attribution
from lightning_ray.spans import RequestLog, SpanClient, SpanKind, SpanStatus, span

Json = dict[str, Any]

# What a request was about; sampling parameters are kept beside.
_SAID = ("system", "instructions", "messages", "input", "prompt", "tools")

# The last event of a stream in the protocols that have one.
_ENDS = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete")

_recording: set[asyncio.Task[None]] = set()


def _spawn(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _recording.add(task)
    task.add_done_callback(_recording.discard)


def _status(reply: aiohttp.ClientResponse) -> SpanStatus:
    return SpanStatus.OK if reply.status < 400 else SpanStatus.ERROR


class AnsweredCall(ABC):
    """One call while it is answered; subclasses say what its span holds."""

    def __init__(
        self, spans: SpanClient, log: RequestLog, policy: str, by: Attribution, body: Json
    ):
        """`body` is the request as it was passed on; `log` remembers earlier ones."""
        self._spans = spans
        self._log = log
        self._request = {name: body[name] for name in _SAID if name in body}
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

    async def stream(self, reply: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
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

    @abstractmethod
    async def _record(self, said: Reply, status: SpanStatus, http_status: int) -> None:
        """Stores the call's span."""

    def _said(self, said: Reply) -> Json:
        """The conversation, and what was answered, as a span's attributes."""
        attributes: Json = {
            "request": self._log.shorten(self._by.attempt_id, self._request),
            "reply": {"text": said.text, "tool_calls": said.tool_calls},
        }
        if self._by.prompt:
            attributes["prompt"] = self._by.prompt
        return attributes

    async def _append(
        self, kind: SpanKind, said: Reply, status: SpanStatus, attributes: Json, **columns: Any
    ) -> None:
        row = span(
            kind,
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
            **columns,
        )
        await self._spans.append([row])
        self._log.stored(self._by.attempt_id, row["span_id"], self._request)


class NotedCall(AnsweredCall):
    """A call that an engine of ours answers, in a rollout whose messages are asked for.

    The engine records the call itself, as tokens; this is what was said, as text.
    """

    async def _record(self, said: Reply, status: SpanStatus, http_status: int) -> None:
        await self._append(SpanKind.MESSAGE, said, status, self._said(said))
