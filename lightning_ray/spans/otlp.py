"""OTLP traces: a body of `ExportTraceServiceRequest`, protobuf or JSON, as one span after another.

Invariant: whatever the body holds, what is in memory at one time is bounded by `TelemetryLimits`
and the body's own size. A message is walked down to its spans by the lengths that it gives, and
only single spans are parsed: a few bytes of a huge list cost no more than a step each.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from lightning_ray.spans.limits import TelemetryLimits

Json = dict[str, Any]
MessageT = TypeVar("MessageT", bound=Message)

Place = tuple[int, int]
"""Where a part of a body begins, and where it ends."""


class UndecodableError(ValueError):
    """The body is not what it says it is; sending it again will not help."""


class TooMuchError(ValueError):
    """The body holds more than is taken in at one time."""


@dataclass(frozen=True)
class OtlpSpan:
    """One span, with what the request says about its source."""

    span: Span
    """Empty where it has more bytes than are taken."""
    scope: InstrumentationScope
    resource: Resource
    bytes: int
    """Its size as protobuf."""


def read_protobuf(body: bytes, limits: TelemetryLimits) -> Iterator[OtlpSpan]:
    """The spans of a protobuf body, one at a time.

    Raises:
        UndecodableError: it is no such message.
        TooMuchError: it has more spans, or more of anything, than `limits` allow.
    """
    walk = _Walk(body, limits)
    for resource_spans in walk.parts((0, len(body)), 1):
        # Where a sender repeats a resource or scope, protobuf merges them; they may come last.
        resource = walk.merged(Resource(), walk.parts(resource_spans, 1))
        for scope_spans in walk.parts(resource_spans, 2):
            scope = walk.merged(InstrumentationScope(), walk.parts(scope_spans, 1))
            for place in walk.parts(scope_spans, 2):
                walk.count()
                size = place[1] - place[0]
                # Judged with the others: one that is too large costs the batch nothing.
                read = [place] if size <= limits.max_span_bytes else []
                yield OtlpSpan(walk.merged(Span(), read), scope, resource, size)


class _Walk:
    """Protobuf's wire format, as far down as the spans."""

    def __init__(self, body: bytes, limits: TelemetryLimits):
        self._body = body
        self._limits = limits
        self._spans = 0
        # Resources, scopes, schema addresses and what this version does not know.
        self._steps = 16 * limits.max_spans + 1024

    def count(self) -> None:
        """One more span."""
        self._spans += 1
        _check_count(self._spans, self._limits)

    def parts(self, place: Place, wanted: int) -> Iterator[Place]:
        """Where the fields of a number lie that have a length, in what lies at `place`."""
        position, end = place
        while position < end:
            self._steps -= 1
            if self._steps < 0:
                raise TooMuchError("the body has too many parts; send smaller batches")
            key, position = self._varint(position, end)
            number, wire_type = key >> 3, key & 7
            if number == 0:
                raise UndecodableError("the body is no protobuf message: a field has number 0")
            if wire_type == 2:
                length, position = self._varint(position, end)
                self._check(position + length <= end)
                if number == wanted:
                    yield position, position + length
                position += length
            elif wire_type == 0:
                _, position = self._varint(position, end)
            elif wire_type in (1, 5):
                position += 8 if wire_type == 1 else 4
                self._check(position <= end)
            else:
                raise UndecodableError(f"the body is no protobuf message: wire type {wire_type}")

    def merged(self, message: MessageT, places: Iterable[Place]) -> MessageT:
        """`message` with what lies at these places parsed into it."""
        for start, end in places:
            _check_part(end - start, self._limits)
            try:
                message.MergeFromString(self._body[start:end])
            except (DecodeError, UnicodeDecodeError) as error:
                name = type(message).__name__
                raise UndecodableError(
                    f"the body is no ExportTraceServiceRequest: a {name} cannot be decoded"
                ) from error
        return message

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            self._check(position < end)
            byte = self._body[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise UndecodableError("the body is no protobuf message: a number does not end")

    def _check(self, inside: bool) -> None:
        if not inside:
            raise UndecodableError("the body is no whole protobuf message: it ends too early")


def _check_part(size: int, limits: TelemetryLimits) -> None:
    if size > limits.max_span_bytes:
        raise TooMuchError(
            f"a resource or scope has {size} bytes; up to {limits.max_span_bytes} are taken "
            "(gateway.telemetry.max_span_bytes)"
        )


def _check_count(spans: int, limits: TelemetryLimits) -> None:
    if spans > limits.max_spans:
        raise TooMuchError(
            f"more than {limits.max_spans} spans in one request (gateway.telemetry.max_spans); "
            "send smaller batches"
        )


def read_json(body: bytes, limits: TelemetryLimits) -> Iterator[OtlpSpan]:
    """The spans of a JSON body, as `read_protobuf` gives those of the same message.

    Ids are hexadecimal digits; fields that the message does not have are left out of account.
    """
    root = parse_json(body)
    # Like protobuf's own reader, absent and null are the empty list.
    spans = 0
    for resource_spans in _objects(root, "resourceSpans", "resource_spans"):
        resource = _message(Resource(), _object(resource_spans, "resource"), limits)
        _check_part(resource.ByteSize(), limits)
        for scope_spans in _objects(resource_spans, "scopeSpans", "scope_spans"):
            scope = _message(InstrumentationScope(), _object(scope_spans, "scope"), limits)
            _check_part(scope.ByteSize(), limits)
            for one in _objects(scope_spans, "spans"):
                spans += 1
                _check_count(spans, limits)
                span = _message(Span(), _with_ids(one), limits)
                size = span.ByteSize()
                small = size <= limits.max_span_bytes
                yield OtlpSpan(span if small else Span(), scope, resource, size)


def parse_json(body: bytes) -> Json:
    """A JSON object. Raises UndecodableError, and TooMuchError where it would outgrow its bytes."""
    # A parsed value takes about 64 bytes. Real telemetry has one for 20 bytes of text and more.
    values = body.count(b"[") + body.count(b"{") + body.count(b",")
    if values > 1024 + len(body) // 6:
        raise TooMuchError("the body has more JSON values than its size allows; send fewer")
    try:
        root = json.loads(body, parse_constant=_no_constant)
    except RecursionError as error:
        raise UndecodableError("the body is nested too deeply") from error
    except ValueError as error:
        raise UndecodableError(f"the body is no JSON: {error}") from error
    if not isinstance(root, dict):
        raise UndecodableError("the body is not a JSON object")
    return root


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _object(parent: Json, name: str) -> Json:
    value = parent.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UndecodableError(f"{name} is to be an object")
    return value


def _objects(parent: Json, *names: str) -> list[Json]:
    value: Any = next((parent[name] for name in names if parent.get(name) is not None), [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UndecodableError(f"{names[0]} is to be a list of objects")
    return value


def _with_ids(span: Json) -> Json:
    """The span with its ids in base64, where protobuf's own reader of JSON wants them."""
    changed = _ids(span, ("traceId", "spanId", "parentSpanId", "trace_id", "span_id"))
    changed = _ids(changed, ("parent_span_id",))
    if isinstance(links := span.get("links"), list):
        names = ("traceId", "spanId", "trace_id", "span_id")
        changed["links"] = [_ids(one, names) if isinstance(one, dict) else one for one in links]
    return changed


def _ids(given: Json, names: tuple[str, ...]) -> Json:
    changed = dict(given)
    for name in names:
        value = given.get(name)
        if value is None:
            continue
        try:
            changed[name] = base64.b64encode(bytes.fromhex(value)).decode()
        except (TypeError, ValueError) as error:
            raise UndecodableError(f"{name} is to be a text of hexadecimal digits") from error
    return changed


# What protobuf's own reader raises for the values that it does not expect.
_UNREADABLE = (
    json_format.ParseError,
    AttributeError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


def _message(message: MessageT, given: Json, limits: TelemetryLimits) -> MessageT:
    try:
        # Each level of a value is an AnyValue, a list or map, and their entries.
        depth = 4 * limits.max_depth + 16
        json_format.ParseDict(given, message, ignore_unknown_fields=True, max_recursion_depth=depth)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise UndecodableError(f"a {type(message).__name__} cannot be read: {reason}") from error
    return message
