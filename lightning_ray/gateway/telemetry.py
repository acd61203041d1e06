"""Telemetry at the door: OTLP traces and Arrow streams of spans, over HTTP.

Invariants: a reply that says that spans were taken is sent after they are on disk; a body is never
larger in memory than the limits allow, however well it is compressed; whatever was sent, the answer
is one of OTLP's, in the encoding of the request.
"""

import asyncio
import json
import logging
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pyarrow as pa
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.responses import Response

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.config import GatewayConfig
from lightning_ray.spans import SpanClient
from lightning_ray.spans.otlp import TooMuchError, UndecodableError, read_json, read_protobuf
from lightning_ray.spans.telemetry import Received, receive, telemetry_batch

log = logging.getLogger(__name__)

TRACES = "/v1/traces"
BULK = "/v1/spans"
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"

RETRY_S = 1
"""What a client that came at a bad moment is told to wait, seconds."""
_INLINE_BYTES = 32 * 1024
_CHUNK = 64 * 1024
_SHOWN_REASONS = 1000
_ROOM_WAIT_S = 5.0
_BUSY = "too much telemetry at one time (gateway.telemetry.max_concurrent); try again"

_CODES = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    413: Code.RESOURCE_EXHAUSTED,
    415: Code.INVALID_ARGUMENT,
    429: Code.RESOURCE_EXHAUSTED,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}
_RETRYABLE = frozenset({429, 503})


class TelemetryRefusedError(Exception):
    """A request of telemetry that goes no further."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message


class Placing(Protocol):
    """Finds the place of spans that arrived: rows of SPAN_SCHEMA, and how many have none."""

    def __call__(
        self, received: Received, /
    ) -> Awaitable[tuple[list[dict[str, Any]], Counter[str]]]: ...


class TelemetryDoor:
    """Takes telemetry in for one replica of the door."""

    def __init__(self, config: GatewayConfig, spans: SpanClient):
        self._config = config
        self._limits = config.telemetry
        self._spans = spans
        self._room = asyncio.Semaphore(config.telemetry.max_concurrent)
        self._held = 0
        """Bytes of bodies in memory, of every request that is being answered."""

    async def traces(
        self, headers: Mapping[str, str], body: AsyncIterator[bytes], source: str, place: Placing
    ) -> Response:
        """Answers a POST of OTLP traces; `place` says where the spans go."""
        encoding = media_type(headers)
        try:
            readers = {PROTOBUF: read_protobuf, JSON: read_json}
            if encoding not in readers:
                raise TelemetryRefusedError(415, f"traces are {PROTOBUF} or {JSON}")
            async with self._content(headers, body) as content:

                def decode() -> Received:
                    return receive(readers[encoding](content, self._limits), self._limits, source)

                received = await self._decoded(len(content), decode)
                rows, lost = await place(received)
                if lost and not rows:
                    raise TelemetryRefusedError(400, _why(lost))
                if rows:
                    batch = await self._decoded(len(content), lambda: telemetry_batch(rows))
                    await self._store(batch)
                return _taken(encoding, received.refused + lost)
        except TelemetryRefusedError as refusal:
            return status_reply(encoding, refusal.status, refusal.message)

    async def bulk(
        self,
        headers: Mapping[str, str],
        body: AsyncIterator[bytes],
        read: Callable[[bytes], tuple[pa.RecordBatch, Counter[str]]],
    ) -> Response:
        """Answers a POST of an Arrow stream; `read` says which of its rows are stored, and why
        others are not.
        """
        try:
            if media_type(headers) != ARROW:
                raise TelemetryRefusedError(415, f"spans are sent here as {ARROW}")
            async with self._content(headers, body) as content:
                batch, refused = await self._decoded(len(content), lambda: read(content))
                if batch.num_rows:
                    await self._store(batch)
                return _taken(JSON, refused)
        except TelemetryRefusedError as refusal:
            return status_reply(JSON, refusal.status, refusal.message)

    @asynccontextmanager
    async def _content(
        self, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        """The body, decompressed while it arrives; what it holds counts until it is let go."""
        form = headers.get("content-encoding", "identity").strip().lower()
        if form not in _WINDOWS:
            raise TelemetryRefusedError(
                415, f"Content-Encoding {form[:50]!r} is not known here: gzip, deflate, identity"
            )
        arrived = counted = 0
        unpacked = Unpacked(form, self._limits.max_decoded_bytes)
        try:
            async for part in body:
                arrived += len(part)
                if arrived > self._config.max_body_bytes:
                    raise TelemetryRefusedError(
                        413,
                        f"the body is larger than {self._config.max_body_bytes} bytes "
                        "(gateway.max_body_bytes); send smaller batches",
                    )
                if unpacked.compressed and len(part) > _INLINE_BYTES // 64:
                    # A small part can unpack to a large one.
                    await asyncio.to_thread(unpacked.feed, part)
                else:
                    unpacked.feed(part)
                self._held += unpacked.size - counted
                counted = unpacked.size
                if self._held > self._limits.max_concurrent * self._limits.max_decoded_bytes:
                    raise TelemetryRefusedError(429, _BUSY)
            yield unpacked.end()
        finally:
            self._held -= counted

    async def _decoded(self, size: int, decode: Callable[[], Any]) -> Any:
        try:
            if size <= _INLINE_BYTES:
                return decode()
            async with asyncio.timeout(_ROOM_WAIT_S):
                await self._room.acquire()
            try:
                return await asyncio.to_thread(decode)
            finally:
                self._room.release()
        except TimeoutError as error:
            raise TelemetryRefusedError(429, _BUSY) from error
        except UndecodableError as error:
            raise TelemetryRefusedError(400, str(error)) from error
        except TooMuchError as error:
            raise TelemetryRefusedError(413, str(error)) from error

    async def _store(self, batch: Any) -> None:
        try:
            await self._spans.append(batch)
        except InfrastructureError as error:
            log.error("telemetry could not be stored: %s", error)
            raise TelemetryRefusedError(503, "the spans could not be stored; try again") from error


# As zlib calls them: a gzip member, a zlib stream, none.
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15, "identity": 0, "": 0}


class Unpacked:
    """A body as it arrives, decompressed up to a limit, so that no more than that is ever held."""

    def __init__(self, form: str, limit: int):
        """`form` is a Content-Encoding of `_WINDOWS`."""
        self._window = _WINDOWS[form]
        self._zlib = zlib.decompressobj(self._window) if self._window else None
        self._limit = limit
        self._parts: list[bytes] = []
        self.size = 0
        """Bytes so far."""

    @property
    def compressed(self) -> bool:
        """Whether it is decompressed at all."""
        return self._zlib is not None

    def feed(self, part: bytes) -> None:
        """Takes the next bytes. Raises TelemetryRefusedError as soon as there is too much."""
        if self._zlib is None:
            self._keep(part)
            return
        while part:
            if self._zlib.eof:
                # Another gzip member may follow the first.
                self._zlib = zlib.decompressobj(self._window)
            self._keep(self._unpack(self._zlib, part))
            part = self._zlib.unconsumed_tail or self._zlib.unused_data

    def end(self) -> bytes:
        """The whole. Raises TelemetryRefusedError where its end is missing."""
        if self._zlib is not None:
            while not self._zlib.eof and (rest := self._unpack(self._zlib, b"")):
                self._keep(rest)
            if not self._zlib.eof:
                raise TelemetryRefusedError(400, "the compressed body ends too early")
        return b"".join(self._parts)

    def _unpack(self, unpacking: Any, part: bytes) -> bytes:
        try:
            unpacked: bytes = unpacking.decompress(part, _CHUNK)
        except zlib.error as error:
            raise TelemetryRefusedError(400, f"the body cannot be unpacked: {error}") from error
        return unpacked

    def _keep(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > self._limit:
            raise TelemetryRefusedError(
                413,
                f"the body unpacks to more than {self._limit} bytes "
                "(gateway.telemetry.max_decoded_bytes); send smaller batches",
            )
        self._parts.append(part)


def media_type(headers: Mapping[str, str]) -> str:
    """The request's content type, without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def status_reply(encoding: str, status: int, message: str) -> Response:
    """An error as OTLP/HTTP has them: a google.rpc.Status in the request's encoding."""
    said = Status(code=_CODES.get(status, Code.UNKNOWN), message=message[:2000])
    headers = {"retry-after": str(RETRY_S)} if status in _RETRYABLE else {}
    return _reply(encoding, said, status, headers)


def _taken(encoding: str, refused: Counter[str]) -> Response:
    said = ExportTraceServiceResponse()
    if refused:
        said.partial_success.rejected_spans = refused.total()
        said.partial_success.error_message = _why(refused)
    return _reply(encoding, said, 200, {})


def _why(refused: Counter[str]) -> str:
    return "; ".join(f"{n} refused: {reason}" for reason, n in refused.items())[:_SHOWN_REASONS]


def _reply(encoding: str, said: Message, status: int, headers: dict[str, str]) -> Response:
    if encoding == PROTOBUF:
        return Response(said.SerializeToString(), status, headers, PROTOBUF)
    return Response(json.dumps(json_format.MessageToDict(said)), status, headers, JSON)
