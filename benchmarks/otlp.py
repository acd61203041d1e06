"""The same calls as an OTLP export, for the routes of both sides; imported by both interpreters."""

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from benchmarks.workload import Call, attributes


def export_request(calls: Sequence[Call], resource: Mapping[str, str]) -> ExportTraceServiceRequest:
    """The calls as an instrumented agent exports them; `resource` says where they come from."""
    request = ExportTraceServiceRequest()
    exported = request.resource_spans.add()
    exported.resource.attributes.extend(_key_value(k, v) for k, v in resource.items())
    scope = exported.scope_spans.add()
    for one in calls:
        scope.spans.append(
            Span(
                trace_id=bytes.fromhex(one.trace_id),
                span_id=bytes.fromhex(one.span_id),
                name="openai.chat.completion",
                kind=Span.SPAN_KIND_CLIENT,
                start_time_unix_nano=one.start_ns,
                end_time_unix_nano=one.end_ns,
                attributes=[_key_value(k, v) for k, v in attributes(one).items()],
                status=Status(code=Status.STATUS_CODE_OK),
            )
        )
    return request


def _key_value(key: str, value: Any) -> KeyValue:
    return KeyValue(key=key, value=_any_value(value))


def _any_value(value: Any) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, list):
        array = AnyValue()
        array.array_value.values.extend(_any_value(item) for item in value)
        return array
    return AnyValue(string_value=str(value))
