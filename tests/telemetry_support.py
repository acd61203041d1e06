"""Requests of telemetry, as exporters would send them."""

import base64
import io
import json
import time
from typing import Any

import pyarrow as pa
from google.protobuf import json_format
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

BEGUN_NS = time.time_ns()


def set_value(into: AnyValue, value: Any) -> None:
    """A plain value as OTLP has it."""
    if isinstance(value, bool):
        into.bool_value = value
    elif isinstance(value, str):
        into.string_value = value
    elif isinstance(value, int):
        into.int_value = value
    elif isinstance(value, float):
        into.double_value = value
    elif isinstance(value, bytes):
        into.bytes_value = value
    elif isinstance(value, list):
        into.array_value.SetInParent()
        for item in value:
            set_value(into.array_value.values.add(), item)
    elif isinstance(value, dict):
        into.kvlist_value.SetInParent()
        set_attributes(into.kvlist_value.values, value)


def set_attributes(into: Any, attributes: dict[str, Any]) -> None:
    """A dictionary as OTLP's list of keys and values."""
    for key, value in attributes.items():
        item = into.add()
        item.key = key
        item.value.SetInParent()
        set_value(item.value, value)


def otel_span(
    number: int = 1, name: str = "step", attributes: dict[str, Any] | None = None, **fields: Any
) -> Span:
    """A span as an SDK would make it; `number` makes its id."""
    begun = BEGUN_NS
    given = {
        "trace_id": b"\x01" * 16,
        "span_id": number.to_bytes(8, "big"),
        "start_time_unix_nano": begun,
        "end_time_unix_nano": begun + 1000,
        **fields,
    }
    span = Span(name=name, **given)
    set_attributes(span.attributes, attributes or {})
    return span


def request(*spans: Span, resource: dict[str, Any] | None = None) -> ExportTraceServiceRequest:
    """An export of these spans."""
    made = ExportTraceServiceRequest()
    part = made.resource_spans.add()
    set_attributes(part.resource.attributes, resource or {})
    scope = part.scope_spans.add()
    scope.scope.name = "scope"
    scope.spans.extend(spans)
    return made


def as_json(made: ExportTraceServiceRequest) -> bytes:
    """The request as OTLP's JSON: ids are hexadecimal digits."""
    body = json_format.MessageToDict(made)
    for part in body.get("resourceSpans", []):
        for scope in part.get("scopeSpans", []):
            for span in scope.get("spans", []):
                for one in (span, *span.get("links", [])):
                    for name in ("traceId", "spanId", "parentSpanId"):
                        if name in one:
                            one[name] = base64.b64decode(one[name]).hex()
    return json.dumps(body).encode()


def arrow_stream(table: pa.Table, **options: Any) -> bytes:
    """The table as an Arrow IPC stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table)
    return sink.getvalue()


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
KEYS = st.one_of(
    TEXTS,
    st.sampled_from(
        [
            "gen_ai.operation.name",
            "gen_ai.tool.name",
            "gen_ai.usage.input_tokens",
            "openinference.span.kind",
            "traceloop.span.kind",
            "llm.cost.total",
            "authorization",
            "cost_usd",
            "otel",
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(
        TEXTS,
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(width=64),
        st.binary(max_size=6),
        st.sampled_from(["chat", "execute_tool", "LLM", "TOOL", "tool", "agent"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
ATTRIBUTES = st.dictionaries(KEYS, VALUES, max_size=5)


@st.composite
def otel_spans(draw: st.DrawFn) -> Span:
    """Any span that may be sent, good or not."""
    span = otel_span(
        draw(st.integers(0, 2**63)),
        draw(TEXTS),
        draw(ATTRIBUTES),
        trace_id=draw(st.sampled_from([b"\x01" * 16, b"\x02" * 16, b"", b"\0" * 16, b"\x01"])),
        parent_span_id=draw(st.sampled_from([b"", b"\x05" * 8, b"\x05"])),
        end_time_unix_nano=draw(st.sampled_from([BEGUN_NS + 1, BEGUN_NS - 1, 0, 2**64 - 1])),
        kind=draw(st.integers(0, 5)),
        trace_state=draw(TEXTS),
        flags=draw(st.integers(0, 2**32 - 1)),
        dropped_attributes_count=draw(st.integers(0, 3)),
    )
    span.status.code = draw(st.integers(0, 2))
    span.status.message = draw(TEXTS)
    for name in draw(st.lists(st.sampled_from(["log", "gen_ai.evaluation.result"]), max_size=2)):
        event = span.events.add(name=name, time_unix_nano=draw(st.integers(0, 2**64 - 1)))
        set_attributes(event.attributes, draw(ATTRIBUTES))
        value = draw(st.floats())
        set_attributes(event.attributes, {"gen_ai.evaluation.score.value": value})
    if draw(st.booleans()):
        link = span.links.add(trace_id=b"\x03" * 16, span_id=b"\x04" * 8)
        set_attributes(link.attributes, draw(ATTRIBUTES))
    return span
