"""Spans that others send, made ours: each judged by itself, and what it may not say taken from it.

Invariant: where a span belongs is said by whoever takes it in, never by the span; what it says of
itself beyond our columns is kept in `attributes` as it was sent, secrets excepted. A span that is
refused is counted with its reason and costs the others nothing.
"""

import base64
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pyarrow as pa
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from lightning_ray.spans.conventions import (
    COST_ATTRIBUTE,
    EVALUATION_EVENT,
    columns_of,
    kind_of,
    named_conversation,
    step_of,
)
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.masking import mask_columns, masked
from lightning_ray.spans.otlp import OtlpSpan, TooMuchError
from lightning_ray.spans.schema import SPAN_SCHEMA, SpanKind, SpanStatus

Json = dict[str, Any]

OTEL = "otel"
"""The attribute that holds what OpenTelemetry keeps beside attributes: events, links, resource."""
EARLIEST_NS = 946_684_800 * 10**9
"""The year 2000: a clock that says an earlier time is not set."""

# What these names mean in `attributes` is ours to say; an attribute called so goes into `otel`.
_RESERVED = frozenset({OTEL, COST_ATTRIBUTE})


_ENCODER = msgspec.json.Encoder()


class _RefusedError(Exception):
    """A span that is not taken; the message is the reason, the same for all that share it."""


@dataclass(frozen=True)
class Arrived:
    """A span that is taken, and the rewards in it: rows that still need their place."""

    rows: tuple[Json, ...]
    trace_id: str
    rollout_id: str | None
    """The rollout that it names, which may be anybody's."""
    conversation: str | None
    """The conversation that it names, as its sender calls it."""


@dataclass
class Received:
    """What a request brought."""

    spans: list[Arrived] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """How many spans were refused for each reason."""

    @property
    def why(self) -> str:
        """Why spans were refused; empty where none was."""
        return "; ".join(f"{count} refused: {reason}" for reason, count in self.refused.items())


def receive(spans: Iterable[OtlpSpan], limits: TelemetryLimits, source: str) -> Received:
    """Judges spans one by one; `source` says whose they are: "agent" or "service".

    Raises:
        TooMuchError: they would be larger when stored than a body may be.
    """
    received = Received()
    latest_ns = time.time_ns() + int(limits.max_clock_skew_s * 1e9)
    # A resource stands once in a body and is stored with each span.
    stored_bytes = 0
    resource = _ResourceOf(limits)
    for one in spans:
        try:
            arrived = _arrived(one, resource.attributes(one), limits, latest_ns, source)
        except _RefusedError as refused:
            received.refused[str(refused)] += 1
            continue
        stored_bytes += sum(len(row["attributes"]) for row in arrived.rows)
        if stored_bytes > 2 * limits.max_decoded_bytes:
            raise TooMuchError("the spans with their resource are too large; send smaller batches")
        received.spans.append(arrived)
    return received


class _ResourceOf:
    """The attributes of the resource that spans share, read once for all of them."""

    def __init__(self, limits: TelemetryLimits):
        self._limits = limits
        self._resource: Any = None
        self._attributes: Json | _RefusedError = {}

    def attributes(self, one: OtlpSpan) -> Json:
        """Those of this span's resource. Raises _RefusedError."""
        if one.resource is not self._resource:
            self._resource = one.resource
            try:
                self._attributes = _attributes(one.resource.attributes, self._limits)
            except _RefusedError as refused:
                self._attributes = refused
        if isinstance(self._attributes, _RefusedError):
            raise self._attributes
        return self._attributes


def to_place(spans: Iterable[Arrived], run_id: str, rollout_id: str, attempt_id: str) -> list[Json]:
    """Rows of SPAN_SCHEMA: these spans in one attempt, whatever they say of themselves."""
    place = {"run_id": run_id, "rollout_id": rollout_id, "attempt_id": attempt_id, "sequence": 0}
    return [{**row, **place} for arrived in spans for row in arrived.rows]


def telemetry_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Rows as one record batch of SPAN_SCHEMA, without the secrets in their texts."""
    batch = pa.RecordBatch.from_pylist(list(rows), schema=SPAN_SCHEMA)
    texts = {name: batch[name] for name in ("name", "agent", "tool", "model", "attributes")}
    for name, column in mask_columns(texts).items():
        place = SPAN_SCHEMA.get_field_index(name)
        batch = batch.set_column(place, SPAN_SCHEMA.field(place), column)
    return batch


def _arrived(
    one: OtlpSpan, resource: Json, limits: TelemetryLimits, latest_ns: int, source: str
) -> Arrived:
    span = one.span
    if one.bytes > limits.max_span_bytes:
        raise _RefusedError(
            f"larger than {limits.max_span_bytes} bytes (gateway.telemetry.max_span_bytes)"
        )
    trace_id, span_id = _id(span.trace_id, 16, "trace id"), _id(span.span_id, 8, "span id")
    parent = _id(span.parent_span_id, 8, "parent span id") if any(span.parent_span_id) else None
    check_times(span.start_time_unix_nano, span.end_time_unix_nano, latest_ns)
    _check_text(span.name, limits)
    _check_text(span.trace_state, limits)
    attributes = _attributes(span.attributes, limits)
    kind = kind_of(attributes)
    row: Json = {
        "span_id": span_id,
        "trace_id": trace_id,
        "parent_span_id": parent,
        "kind": kind.value,
        "name": span.name or kind.value,
        "start_ns": span.start_time_unix_nano,
        "end_ns": span.end_time_unix_nano,
        "status": _status(span.status).value,
        "source": source,
        **columns_of(kind, span.name, attributes),
    }
    events = [_event(event, limits) for event in _few(span.events, "events", limits)]
    rewards = tuple(
        _reward(row, place, event, step_of(attributes))
        for place, event in enumerate(events)
        if event["name"] == EVALUATION_EVENT
    )
    otel = _otel(one, attributes, resource, events, limits)
    kept = {key: value for key, value in attributes.items() if key not in _RESERVED}
    row["attributes"] = _dumped({**kept, OTEL: otel})
    rollout_id, conversation = named_conversation(attributes, resource)
    return Arrived((row, *rewards), trace_id, rollout_id, conversation)


def _reward(row: Json, place: int, event: Json, step: int | None) -> Json:
    """What an evaluation's event says of its span: a reward, or a verdict without a number."""
    said = event["attributes"]
    value = said.get("gen_ai.evaluation.score.value")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    name = said.get("gen_ai.evaluation.name")
    # The same event sent again is the same reward.
    known = f"{row['trace_id']}/{row['span_id']}/{place}"
    own_step = step_of(said)
    return {
        "span_id": hashlib.sha256(known.encode()).hexdigest()[:16],
        "trace_id": row["trace_id"],
        "parent_span_id": row["span_id"],
        "kind": (SpanKind.REWARD if number else SpanKind.FEEDBACK).value,
        "name": name if isinstance(name, str) and name else "evaluation",
        "start_ns": event["time_ns"] or row["end_ns"],
        "end_ns": event["time_ns"] or row["end_ns"],
        "status": SpanStatus.OK.value,
        "agent": row["agent"],
        "source": row["source"],
        "value": float(value) if number else None,
        "step": step if own_step is None else own_step,
        "attributes": _dumped({k: v for k, v in said.items() if k not in _RESERVED}),
    }


def check_times(start_ns: int, end_ns: int, latest_ns: int) -> None:
    """Refuses a span whose times cannot be."""
    if start_ns < EARLIEST_NS or end_ns > latest_ns:
        raise _RefusedError("its times are missing, before the year 2000 or in the future")
    if end_ns < start_ns:
        raise _RefusedError("it ends before it begins")


def _otel(
    one: OtlpSpan, attributes: Json, resource: Json, events: list[Json], limits: TelemetryLimits
) -> Json:
    span = one.span
    links = [
        {
            "trace_id": _id(link.trace_id, 16, "trace id in a link"),
            "span_id": _id(link.span_id, 8, "span id in a link"),
            "trace_state": link.trace_state,
            "attributes": _attributes(link.attributes, limits),
        }
        for link in _few(span.links, "links", limits)
    ]
    dropped = {
        "attributes": span.dropped_attributes_count,
        "events": span.dropped_events_count,
        "links": span.dropped_links_count,
    }
    _check_text(span.status.message, limits)
    scope = {
        "name": one.scope.name,
        "version": one.scope.version,
        "attributes": _attributes(one.scope.attributes, limits),
    }
    said = {
        "kind": _KINDS.get(span.kind),
        "status_message": span.status.message,
        "trace_state": span.trace_state,
        "flags": span.flags,
        "scope": _filled(scope),
        "resource": resource,
        "events": [_filled(event) for event in events],
        "links": [_filled(link) for link in links],
        "dropped": _filled(dropped),
        "attributes": {key: attributes[key] for key in _RESERVED if key in attributes},
    }
    return _filled(said)


_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}


def _filled(said: Json) -> Json:
    return {key: value for key, value in said.items() if value not in ("", 0, None, [], {})}


def _event(event: Span.Event, limits: TelemetryLimits) -> Json:
    _check_text(event.name, limits)
    return {
        "name": event.name,
        "time_ns": min(event.time_unix_nano, 2**63 - 1),
        "attributes": _attributes(event.attributes, limits),
    }


def _few(
    items: RepeatedCompositeFieldContainer[Any], what: str, limits: TelemetryLimits
) -> RepeatedCompositeFieldContainer[Any]:
    if len(items) > limits.max_attributes:
        raise _RefusedError(
            f"more than {limits.max_attributes} {what} (gateway.telemetry.max_attributes)"
        )
    return items


def _id(value: bytes, length: int, what: str) -> str:
    if len(value) != length or not any(value):
        raise _RefusedError(f"the {what} is missing, or not of {length} bytes")
    return value.hex()


def _status(status: Status) -> SpanStatus:
    return SpanStatus.ERROR if status.code == Status.STATUS_CODE_ERROR else SpanStatus.OK


def _attributes(given: RepeatedCompositeFieldContainer[KeyValue], limits: TelemetryLimits) -> Json:
    _few(given, "attributes", limits)
    found = {}
    for item in given:
        _check_text(item.key, limits)
        found[item.key] = masked(item.key, _value(item.value, limits, limits.max_depth))
    return found


def _value(value: AnyValue, limits: TelemetryLimits, depth: int) -> Any:
    which = value.WhichOneof("value")
    if which is None:
        return None
    if which in ("array_value", "kvlist_value"):
        if depth == 0:
            raise _RefusedError(
                f"an attribute is nested deeper than {limits.max_depth} levels "
                "(gateway.telemetry.max_depth)"
            )
        if which == "array_value":
            items = value.array_value.values
            # Token ids: a number that is not there reads as 0, so these are all integers.
            numbers = [item.int_value for item in items]
            if all(numbers):
                return numbers
            return [_value(item, limits, depth - 1) for item in items]
        return {
            item.key: _value(item.value, limits, depth - 1) for item in value.kvlist_value.values
        }
    if which == "string_value":
        _check_text(value.string_value, limits)
        return value.string_value
    if which == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    if which == "double_value" and not math.isfinite(value.double_value):
        # JSON has no such numbers; the words are protobuf's.
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value.double_value, "NaN")
    return getattr(value, which)


def _check_text(text: str, limits: TelemetryLimits) -> None:
    # No character takes more than 4 bytes, so most texts need not be encoded to be measured.
    limit = limits.max_value_bytes
    if 4 * len(text) > limit and len(text.encode()) > limit:
        raise _RefusedError(
            f"a name or value has more than {limit} bytes (gateway.telemetry.max_value_bytes)"
        )


def _dumped(attributes: Json) -> str:
    return _ENCODER.encode(attributes).decode()
