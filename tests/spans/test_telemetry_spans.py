"""Spans that others send: what of them is kept, what they become, and what is refused."""

import json
import math
import random
import tracemalloc
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_support import (
    BEGUN_NS,
    as_json,
    otel_span,
    otel_spans,
    request,
    set_attributes,
)

from lightning_ray.spans import SPAN_SCHEMA, query
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.otlp import TooMuchError, UndecodableError, read_json, read_protobuf
from lightning_ray.spans.telemetry import Received, receive, telemetry_batch, to_place

LIMITS = TelemetryLimits()
SMALL = TelemetryLimits(
    max_decoded_bytes=100_000,
    max_spans=20,
    max_span_bytes=2000,
    max_attributes=8,
    max_value_bytes=200,
    max_depth=3,
)


def received(*spans: Any, limits: TelemetryLimits = LIMITS, **how: Any) -> Received:
    body = request(*spans, **how).SerializeToString()
    return receive(read_protobuf(body, limits), limits, "agent")


def rows(*spans: Any, **how: Any) -> list[dict[str, Any]]:
    """The stored rows, attributes parsed."""
    placed = to_place(received(*spans, **how).spans, "run", "r", "r/1")
    found = telemetry_batch(placed).to_pylist()
    return [{**row, "attributes": json.loads(row["attributes"])} for row in found]


def test_a_span_keeps_its_ids_times_status_events_and_links() -> None:
    span = otel_span(
        7, "plan", {"a": 1, "b": [True, {"c": 2.5}]}, parent_span_id=b"\x05" * 8, kind=3
    )
    span.status.code, span.status.message = 2, "broke"
    event = span.events.add(name="exception", time_unix_nano=BEGUN_NS + 5)
    set_attributes(event.attributes, {"exception.type": "KeyError"})
    link = span.links.add(trace_id=b"\x03" * 16, span_id=b"\x04" * 8)
    set_attributes(link.attributes, {"why": "retry"})
    (row,) = rows(span, resource={"service.name": "shop"})
    assert (row["trace_id"], row["span_id"], row["parent_span_id"]) == (
        "01" * 16,
        "0000000000000007",
        "05" * 8,
    )
    assert (row["start_ns"], row["end_ns"]) == (BEGUN_NS, BEGUN_NS + 1000)
    assert (row["kind"], row["name"], row["status"]) == ("agent_step", "plan", "error")
    assert (row["run_id"], row["rollout_id"], row["attempt_id"]) == ("run", "r", "r/1")
    assert row["source"] == "agent"
    assert row["attributes"] == {
        "a": 1,
        "b": [True, {"c": 2.5}],
        "otel": {
            "kind": "client",
            "status_message": "broke",
            "scope": {"name": "scope"},
            "resource": {"service.name": "shop"},
            "events": [
                {
                    "name": "exception",
                    "time_ns": BEGUN_NS + 5,
                    "attributes": {"exception.type": "KeyError"},
                }
            ],
            "links": [{"trace_id": "03" * 16, "span_id": "04" * 8, "attributes": {"why": "retry"}}],
        },
    }


CALL = {"model": "m-1", "input_tokens": 12, "output_tokens": 3}


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        (
            "chat m",
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": "m",
                "gen_ai.response.model": "m-1",
                "gen_ai.usage.input_tokens": 12,
                "gen_ai.usage.output_tokens": 3,
            },
            {"kind": "message", **CALL},
        ),
        (
            "execute_tool search",
            {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "search"},
            {"kind": "tool_call", "tool": "search"},
        ),
        (
            "execute_tool search",
            {"gen_ai.operation.name": "execute_tool"},
            {"kind": "tool_call", "tool": "search"},
        ),
        (
            "invoke_agent planner",
            {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "planner"},
            {"kind": "agent_step", "agent": "planner"},
        ),
        ("x", {"gen_ai.operation.name": "create_agent"}, {"kind": "agent_step"}),
        (
            "ChatCompletion",
            {
                "openinference.span.kind": "LLM",
                "llm.model_name": "m-1",
                "llm.token_count.prompt": 12,
                "llm.token_count.completion": 3,
                "llm.cost.total": 0.25,
            },
            {"kind": "message", "cost_usd": 0.25, **CALL},
        ),
        (
            "search",
            {"openinference.span.kind": "TOOL", "tool.name": "search"},
            {"kind": "tool_call", "tool": "search"},
        ),
        ("docs", {"openinference.span.kind": "RETRIEVER"}, {"kind": "agent_step"}),
        (
            "a",
            {"openinference.span.kind": "AGENT", "agent.name": "planner"},
            {"kind": "agent_step", "agent": "planner"},
        ),
        (
            "planner.agent",
            {"traceloop.span.kind": "agent", "traceloop.entity.name": "planner"},
            {"kind": "agent_step", "agent": "planner"},
        ),
        (
            "search.tool",
            {"traceloop.span.kind": "tool", "traceloop.entity.name": "search"},
            {"kind": "tool_call", "tool": "search"},
        ),
        ("flow.workflow", {"traceloop.span.kind": "workflow"}, {"kind": "agent_step"}),
        (
            "openai.chat",
            {
                "llm.request.type": "chat",
                "gen_ai.request.model": "m-1",
                "gen_ai.usage.prompt_tokens": 12,
                "gen_ai.usage.completion_tokens": 3,
                "llm.usage.total_tokens": 15,
                "gen_ai.prompt.0.content": "hello",
            },
            {"kind": "message", **CALL},
        ),
        ("tools/call add", {"mcp.method.name": "tools/call"}, {"kind": "tool_call", "tool": "add"}),
        ("GET", {"http.request.method": "GET"}, {"kind": "agent_step"}),
        # Values of other types are left to the attributes.
        (
            "chat",
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": ["m"],
                "gen_ai.usage.input_tokens": "12",
                "gen_ai.usage.output_tokens": -1,
                "llm.cost.total": math.inf,
            },
            {"kind": "message", "input_tokens": 12},
        ),
        ("x", {"gen_ai.operation.name": 7, "tool.name": {"a": 1}}, {"kind": "agent_step"}),
    ],
)
def test_the_conventions_are_understood(
    name: str, attributes: dict[str, Any], expected: dict[str, Any]
) -> None:
    (row,) = rows(otel_span(1, name, attributes))
    columns = ("kind", "agent", "tool", "model", "input_tokens", "output_tokens", "cost_usd")
    assert {c: row[c] for c in columns if row[c] is not None} == expected
    kept = {k: v for k, v in row["attributes"].items() if k != "otel"}
    assert kept == json.loads(json.dumps(attributes).replace("Infinity", '"Infinity"'))


def test_a_telemetry_span_is_never_an_engines_call() -> None:
    (row,) = rows(otel_span(1, "chat", {"gen_ai.operation.name": "chat"}))
    assert row["kind"] != "model_call"
    for column in ("policy", "version", "token_ids", "logprobs", "continues", "role"):
        assert row[column] is None


def test_an_evaluations_event_is_a_reward_and_the_same_one_when_it_is_sent_again() -> None:
    span = otel_span(1, "chat", {"gen_ai.operation.name": "chat", "lightning_ray.step": 4})
    for said in (
        {"gen_ai.evaluation.name": "accuracy", "gen_ai.evaluation.score.value": 0.5},
        {"gen_ai.evaluation.name": "tone", "gen_ai.evaluation.score.label": "fail"},
        {"gen_ai.evaluation.score.value": math.nan},
    ):
        event = span.events.add(name="gen_ai.evaluation.result", time_unix_nano=BEGUN_NS)
        set_attributes(event.attributes, said)
    call, *given = rows(span)
    assert [(r["kind"], r["name"], r["value"], r["step"]) for r in given] == [
        ("reward", "accuracy", 0.5, 4),
        ("feedback", "tone", None, 4),
        ("feedback", "evaluation", None, 4),
    ]
    assert all(r["parent_span_id"] == call["span_id"] and r["source"] == "agent" for r in given)
    assert [r["span_id"] for r in rows(span)] == [call["span_id"], *(r["span_id"] for r in given)]
    assert len({r["span_id"] for r in given}) == 3


def test_secrets_are_not_stored() -> None:
    secret = "s3cr3t-value-of-mine"
    attributes = {
        "http.request.header.authorization": ["Bearer " + secret],
        "http.request.header.x-api-key": [secret],
        "llm.headers": json.dumps({"Authorization": secret, "x": "kept-1"}),
        "llm.invocation_parameters": json.dumps({"api_key": secret, "temperature": 0}),
        "config": {"password": secret, "nested": {"access_token": secret}, "note": "kept-2"},
        "repr": f"{{'api_key': '{secret}', 'b': 1}}",
        "db.url": f"postgres://me:{secret}@host/db",
        "curl": f"-H 'Authorization: Bearer {secret}'",
        "url.full": "http://127.0.0.1:1/a/" + "C" * 32 + "/v1/chat/completions",
        "said": "sk-" + "a" * 24,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.tool.name": "token_counter",
    }
    span = otel_span(1, f"GET http://u:{secret}@host/", attributes)
    set_attributes(span.events.add(name="e").attributes, {"client_secret": secret})
    (row,) = rows(span, resource={"api.key": secret})
    stored = json.dumps(row)
    assert secret not in stored and "C" * 32 not in stored and "aaaa" not in stored
    assert "kept-1" in stored and "kept-2" in stored
    assert row["input_tokens"] == 3 and row["tool"] == "token_counter"
    assert row["attributes"]["url.full"] == "http://127.0.0.1:1/a/***/v1/chat/completions"


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        (otel_span(0), "span id is missing"),
        (otel_span(1, trace_id=b""), "trace id is missing"),
        (otel_span(1, trace_id=b"\x01" * 15), "trace id is missing, or not of 16 bytes"),
        (otel_span(1, parent_span_id=b"\x01"), "parent span id"),
        (otel_span(1, start_time_unix_nano=0), "times are missing"),
        (otel_span(1, end_time_unix_nano=0), "ends before it begins"),
        (otel_span(1, end_time_unix_nano=BEGUN_NS - 1), "ends before it begins"),
        (otel_span(1, end_time_unix_nano=2**64 - 1), "in the future"),
        (otel_span(1, "n" * 201), "max_value_bytes"),
        (otel_span(1, "x", {"a": "ü" * 101}), "max_value_bytes"),
        (otel_span(1, "x", {"k" * 201: 1}), "max_value_bytes"),
        (otel_span(1, "x", {str(n): n for n in range(9)}), "more than 8 attributes"),
        (otel_span(1, "x", {"a": [[[[1]]]]}), "nested deeper than 3 levels"),
        (
            otel_span(1, "x", {str(n): "y" * 199 for n in range(8)} | {"0": [["z" * 190] * 3]}),
            "2000",
        ),
    ],
)
def test_a_bad_span_is_refused_with_its_reason_and_the_others_are_kept(
    span: Any, reason: str
) -> None:
    found = received(otel_span(8, "good"), span, otel_span(9, "good"), limits=SMALL)
    assert [arrived.rows[0]["name"] for arrived in found.spans] == ["good", "good"]
    ((why, count),) = found.refused.items()
    assert reason in why and count == 1


@settings(max_examples=50)
@given(st.lists(otel_spans(), max_size=4), st.dictionaries(st.text("ab", max_size=2), st.text("é")))
def test_json_is_stored_as_the_same_protobuf_is(spans: list[Any], resource: dict[str, str]) -> None:
    made = request(*spans, resource=resource)
    one = receive(read_protobuf(made.SerializeToString(), LIMITS), LIMITS, "agent")
    other = receive(read_json(as_json(made), LIMITS), LIMITS, "agent")
    assert one == other
    assert sum(one.refused.values()) + len(one.spans) == len(spans)
    # And whatever is taken can be stored, read and asked for.
    batch = telemetry_batch(to_place(one.spans, "run", "r", "r/1"))
    batch.validate(full=True)
    assert batch.schema.equals(SPAN_SCHEMA)
    table = pa.Table.from_batches([batch])
    valid = "SELECT coalesce(bool_and(json_valid(attributes)), true) AS valid FROM spans"
    assert query(table, valid)["valid"].to_pylist() == [True]


def test_json_may_have_fields_and_spellings_that_others_do_not() -> None:
    (_, good), *_ = [("", otel_span(3, "x", {"a": 1}))]
    body = json.loads(as_json(request(good)))
    body["unknown"] = {"a": []}
    span = body["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    span["newField"] = [1]
    span["traceId"] = span["traceId"].upper()
    span["attributes"].append({"key": "b", "value": {"newValue": 1}})
    found = receive(read_json(json.dumps(body).encode(), LIMITS), LIMITS, "agent")
    assert found.spans[0].rows[0]["trace_id"] == "01" * 16
    assert json.loads(found.spans[0].rows[0]["attributes"])["a"] == 1
    assert receive(read_json(b"{}", LIMITS), LIMITS, "agent").spans == []


def _read(body: bytes, form: str, limits: TelemetryLimits = SMALL) -> Received | None:
    """What a body brings; None where it is refused as a whole."""
    reader = {"protobuf": read_protobuf, "json": read_json}[form]
    try:
        found = receive(reader(body, limits), limits, "agent")
    except (UndecodableError, TooMuchError):
        return None
    telemetry_batch(to_place(found.spans, "run", "r", "r/1")).validate(full=True)
    return found


@given(st.binary(max_size=300), st.sampled_from(["protobuf", "json"]))
def test_random_bytes_are_refused_or_harmless(body: bytes, form: str) -> None:
    _read(body, form)


@settings(max_examples=200)
@given(st.lists(otel_spans(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_mutated_request_is_refused_or_harmless(spans: list[Any], chance: random.Random) -> None:
    for form, body in (
        ("protobuf", request(*spans).SerializeToString()),
        ("json", as_json(request(*spans))),
    ):
        changed = bytearray(body)
        for _ in range(chance.choice([1, 2, 8])):
            place = chance.randrange(len(changed))
            if chance.random() < 0.3:
                del changed[place : place + chance.randrange(1, 9)]
                changed = changed or bytearray(b"\0")
            else:
                changed[place] = chance.randrange(256)
        _read(bytes(changed), form)


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["key", "value", "stringValue", "arrayValue", "values", "intValue"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)
FIELDS = ["traceId", "spanId", "name", "kind", "attributes", "events", "links", "status", "flags"]


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4), JSON_VALUES)
def test_wrong_types_in_json_are_refused_or_harmless(fields: dict[str, Any], odd: Any) -> None:
    body = json.loads(as_json(request(otel_span(1))))
    body["resourceSpans"][0]["scopeSpans"][0]["spans"][0].update(fields)
    _read(json.dumps(body).encode(), "json")
    for path in ("resourceSpans", "scopeSpans", "spans", "resource"):
        inner = {path: odd}
        for outer in ("scopeSpans", "resourceSpans"):
            _read(json.dumps(inner).encode(), "json")
            inner = {outer: [inner]}


@pytest.mark.parametrize(
    ("form", "body"),
    [
        ("protobuf", b"\x0a\x00" * 2_000_000),
        ("protobuf", b"\x0a\x04\x12\x02\x12\x00" * 500_000),
        ("protobuf", b"\x08\x01" * 2_000_000),
        ("protobuf", b"\x0a\x82\x89\x7a" + b"\x12\x00" * 1_000_000),
        ("json", b"[" * 1_000_000),
        ("json", b'{"a":' * 1_000_000),
        ("json", b'{"resourceSpans":[' + b"{}," * 1_000_000 + b"{}]}"),
        ("json", b'{"resourceSpans":[' + b"0," * 1_000_000 + b"0]}"),
        ("json", b'{"a":' + b"9" * 1_000_000 + b"}"),
    ],
)
def test_huge_lists_and_deep_nesting_cost_no_more_than_their_bytes(form: str, body: bytes) -> None:
    tracemalloc.start()
    assert _read(body, form) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(body) + 2_000_000


def test_a_resource_that_every_span_repeats_is_not_stored_beyond_the_limit() -> None:
    spans = [otel_span(number) for number in range(1, 20)]
    big = {str(n): "x" * 190 for n in range(8)}
    limits = TelemetryLimits(max_decoded_bytes=10_000, max_spans=100, max_span_bytes=5000)
    assert _read(request(*spans, resource=big).SerializeToString(), "protobuf", limits) is None
