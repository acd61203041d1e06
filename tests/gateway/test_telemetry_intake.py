"""Telemetry over HTTP, from the request's bytes to a real store and back to the reply's bytes."""

import asyncio
import gzip
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from google.rpc.status_pb2 import Status
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.requests import Request
from starlette.responses import Response
from telemetry_support import (
    arrow_stream,
    as_json,
    otel_span,
    request,
)

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.config import GatewayConfig, ServingConfig
from lightning_ray.gateway.desk import Desk
from lightning_ray.gateway.intake import BULK, REWARDS, TRACES, Intake
from lightning_ray.gateway.telemetry import ARROW, JSON, PROTOBUF
from lightning_ray.rollouts import Identity
from lightning_ray.spans import SpansConfig, to_batch
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.store import SpanStore

CONFIG = GatewayConfig(
    max_body_bytes=100_000,
    telemetry=TelemetryLimits(
        max_decoded_bytes=200_000, max_spans=100, max_span_bytes=20_000, max_concurrent=2
    ),
)
WHO = Identity("run", "r", "r/1")
GOOD = request(otel_span(1)).SerializeToString()


class Direct:
    """A store that is asked without Ray in between."""

    def __init__(self, folder: Path):
        self.store = SpanStore(str(folder), SpansConfig())
        self.broken = False

    async def append(self, rows: Any) -> None:
        if self.broken:
            raise InfrastructureError("the disk is full")
        await self.store.append(to_batch(rows))


class Doors:
    """An intake over a store in a folder."""

    def __init__(self, folder: Path, config: GatewayConfig = CONFIG):
        self.spans = Direct(folder)
        self.intake = Intake(config, self.spans)  # type: ignore[arg-type]

    def post(
        self, path: str, body: bytes, content_type: str = PROTOBUF, **headers: str
    ) -> Response:
        """What a POST of an attempt is answered."""
        return asyncio.run(self.answer(path, body, content_type, **headers))

    async def answer(
        self, path: str, body: bytes, content_type: str = PROTOBUF, **headers: str
    ) -> Response:
        asked = _request(path, body, {"content-type": content_type, **headers})
        return await self.intake.attempt(path, WHO, asked)

    def stored(self) -> list[dict[str, Any]]:
        """The attempt's rows."""
        return asyncio.run(self.spans.store.read(["r/1"])).to_pylist()


def _request(path: str, body: bytes, headers: dict[str, str]) -> Request:
    parts = [body[i : i + 4096] for i in range(0, len(body), 4096)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": place < len(parts) - 1}
        for place, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return messages.pop(0)

    raw = [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    return Request(scope, receive)


def status_of(reply: Response) -> tuple[int, str]:
    """The HTTP status, and what the google.rpc.Status says."""
    if reply.headers["content-type"] == PROTOBUF:
        return reply.status_code, Status.FromString(bytes(reply.body)).message
    return reply.status_code, json.loads(bytes(reply.body))["message"]


@pytest.fixture
def doors(tmp_path: Path) -> Doors:
    return Doors(tmp_path)


@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate"])
@pytest.mark.parametrize("form", [PROTOBUF, JSON, "application/json; charset=utf-8"])
def test_spans_are_stored_before_they_are_acknowledged_in_the_requests_encoding(
    doors: Doors, form: str, encoding: str
) -> None:
    made = request(otel_span(1, "one"), otel_span(2, "two"))
    body = made.SerializeToString() if form == PROTOBUF else as_json(made)
    packed = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[encoding](body)
    for _ in range(2):
        # Sent again, it is stored once.
        reply = doors.post(TRACES, packed, form, content_encoding=encoding)
        assert reply.status_code == 200
        assert reply.headers["content-type"] == form.partition(";")[0]
        assert bytes(reply.body) == (b"" if form == PROTOBUF else b"{}")
    assert [(row["name"], row["attempt_id"]) for row in doors.stored()] == [
        ("one", "r/1"),
        ("two", "r/1"),
    ]


def test_spans_that_are_refused_are_told_beside_those_that_are_kept(doors: Doors) -> None:
    claim = {"lightning_ray.rollout_id": "another", "gen_ai.conversation.id": "another"}
    made = request(otel_span(1, "good", claim), otel_span(2, trace_id=b""), otel_span(0))
    reply = ExportTraceServiceResponse.FromString(
        bytes(doors.post(TRACES, made.SerializeToString()).body)
    )
    assert reply.partial_success.rejected_spans == 2
    assert "trace id is missing" in reply.partial_success.error_message
    said = json.loads(bytes(doors.post(TRACES, as_json(made), JSON).body))
    assert said["partialSuccess"]["rejectedSpans"] == "2"
    (row,) = doors.stored()
    assert (row["rollout_id"], row["attempt_id"]) == ("r", "r/1")


@pytest.mark.parametrize(
    ("body", "form", "headers", "status", "reason"),
    [
        (b"\xff" * 50, PROTOBUF, {}, 400, "no protobuf"),
        (b"{", JSON, {}, 400, "no JSON"),
        (b"[]", JSON, {}, 400, "not a JSON object"),
        (GOOD, "text/plain", {}, 415, "traces are"),
        (GOOD, "", {}, 415, "traces are"),
        (GOOD, PROTOBUF, {"content_encoding": "br"}, 415, "'br' is not known"),
        (GOOD, PROTOBUF, {"content_encoding": "gzip"}, 400, "cannot be unpacked"),
        (gzip.compress(GOOD)[:-9], PROTOBUF, {"content_encoding": "gzip"}, 400, "ends too early"),
        (gzip.compress(GOOD)[:5], PROTOBUF, {"content_encoding": "gzip"}, 400, "ends too early"),
        (b"x" * 100_001, PROTOBUF, {}, 413, "gateway.max_body_bytes"),
        (
            gzip.compress(b"\0" * 50_000_000),
            PROTOBUF,
            {"content_encoding": "gzip"},
            413,
            "gateway.telemetry.max_decoded_bytes",
        ),
        (
            zlib.compress(b"{" * 10_000_000),
            JSON,
            {"content_encoding": "deflate"},
            413,
            "gateway.telemetry.max_decoded_bytes",
        ),
        (request(*(otel_span(n) for n in range(1, 102))).SerializeToString(), PROTOBUF, {}, 413,
         "gateway.telemetry.max_spans"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_in_the_requests_encoding(
    doors: Doors, body: bytes, form: str, headers: dict[str, str], status: int, reason: str
) -> None:
    reply = doors.post(TRACES, body, form, **headers)
    assert reply.headers["content-type"] == (PROTOBUF if form == PROTOBUF else JSON)
    found, message = status_of(reply)
    assert found == status and reason in message
    assert doors.stored() == []
    assert doors.post(TRACES, GOOD).status_code == 200 and len(doors.stored()) == 1


def test_a_gzip_bomb_is_stopped_while_it_unpacks(doors: Doors) -> None:
    bomb = gzip.compress(b"\0" * 90_000_000)
    assert len(bomb) < CONFIG.max_body_bytes
    tracemalloc.start()
    assert doors.post(TRACES, bomb, content_encoding="gzip").status_code == 413
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * CONFIG.telemetry.max_decoded_bytes
    many = gzip.compress(b"") * 4000
    assert doors.post(TRACES, many, content_encoding="gzip").status_code == 200


def test_a_store_that_takes_nothing_is_a_reason_to_come_again(doors: Doors) -> None:
    doors.spans.broken = True
    for path, body, form in (
        (TRACES, GOOD, PROTOBUF),
        (BULK, arrow_stream(_table()), ARROW),
        (REWARDS, b"1", JSON),
    ):
        reply = doors.post(path, body, form)
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1"


def test_more_bodies_than_fit_are_asked_to_come_again(tmp_path: Path) -> None:
    doors = Doors(tmp_path)
    body = request(*(otel_span(n, "x", {"a": "y" * 9000}) for n in (1, 2))).SerializeToString()

    async def many() -> list[Response]:
        slow = asyncio.Event()
        append = doors.spans.append

        async def waiting(rows: Any) -> None:
            await slow.wait()
            await append(rows)

        doors.spans.append = waiting  # type: ignore[method-assign]
        asking = [asyncio.ensure_future(doors.answer(TRACES, body)) for _ in range(30)]
        await asyncio.wait(asking, timeout=1)
        slow.set()
        return await asyncio.gather(*asking)

    replies = asyncio.run(many())
    assert {reply.status_code for reply in replies} == {200, 429}
    assert all(r.headers["retry-after"] == "1" for r in replies if r.status_code == 429)
    assert doors.intake._telemetry._held == 0
    assert doors.post(TRACES, GOOD).status_code == 200


def _table(**columns: Any) -> pa.Table:
    return pa.table({"span_id": ["00" * 7 + "07"], "kind": ["tool_call"], "name": ["t"], **columns})


def test_an_arrow_stream_is_stored_in_the_attempt(doors: Doors) -> None:
    reply = doors.post(BULK, gzip.compress(arrow_stream(_table())), ARROW, content_encoding="gzip")
    assert (reply.status_code, bytes(reply.body)) == (200, b"{}")
    (row,) = doors.stored()
    assert (row["name"], row["attempt_id"], row["sequence"]) == ("t", "r/1", 1)
    forged = pa.concat_tables([_table(policy=["p"]), _table()], promote_options="default")
    said = json.loads(bytes(doors.post(BULK, arrow_stream(forged), ARROW).body))
    assert said["partialSuccess"]["rejectedSpans"] == "1"
    assert status_of(doors.post(BULK, b"no", ARROW))[0] == 400
    assert status_of(doors.post(BULK, GOOD, PROTOBUF))[0] == 415
    assert len(doors.stored()) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (0.5, [("reward", 0.5, None)]),
        ({"value": 1}, [("reward", 1.0, None)]),
        ({"name": "exact", "value": -1, "step": 3}, [("exact", -1.0, 3)]),
        ([{"name": "a", "value": 1}, {"value": 2, "comment": "ok"}], [("a", 1, None),
                                                                     ("reward", 2, None)]),
        ({"reward": 0, "exact": 1}, [("reward", 0, None), ("exact", 1, None)]),
    ],
)  # fmt: skip
def test_an_attempt_gives_itself_rewards(doors: Doors, body: Any, expected: list[Any]) -> None:
    reply = doors.post(REWARDS, json.dumps(body).encode(), JSON)
    assert json.loads(bytes(reply.body)) == {"kept": len(expected)}
    rows = doors.stored()
    assert [(row["name"], row["value"], row["step"]) for row in rows] == expected
    assert {row["source"] for row in rows} == {"agent"}


@pytest.mark.parametrize(
    ("data", "attributes"),
    [
        ({"value": 1}, None),
        ({"value": 0.5, "source": "agent", "reason": "exact"},
         {"source": "agent", "reason": "exact"}),
        ({"value": -2, "metadata": {"turns": [1, None], "ä": "☃"}},
         {"metadata": {"turns": [1, None], "ä": "☃"}}),
    ],
)  # fmt: skip
def test_an_event_may_be_a_reward(doors: Doors, data: Any, attributes: Any) -> None:
    event = {"event_type": "reward", "data": data, "more": "is not read"}
    reply = doors.post(REWARDS, json.dumps(event).encode(), JSON)
    assert json.loads(bytes(reply.body)) == {"kept": 1}
    (row,) = doors.stored()
    assert (row["kind"], row["name"], row["value"]) == ("reward", "reward", float(data["value"]))
    assert (row["source"], row["step"]) == ("agent", None)
    assert row["attributes"] == attributes or json.loads(row["attributes"]) == attributes


@pytest.mark.parametrize("data", [None, {"answer": "42", "deep": {"a": [1]}}])
def test_an_event_of_another_type_is_a_step_of_the_agent(doors: Doors, data: Any) -> None:
    event = {"event_type": "agent_output"} | ({} if data is None else {"data": data})
    assert doors.post(REWARDS, json.dumps(event).encode(), JSON).status_code == 200
    (row,) = doors.stored()
    assert (row["kind"], row["name"], row["value"]) == ("agent_step", "agent_output", None)
    assert json.loads(row["attributes"] or "null") == data


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no JSON"),
        (b'{"event_type": ""}', "`event_type`"),
        (b'{"event_type": "\\ud800"}', "surrogate"),
        (b'{"event_type": "reward"}', '"data": {"value": 1.0}'),
        (b'{"event_type": "reward", "data": {"value": "1"}}', "finite number"),
        (b'{"event_type": "reward", "data": {"value": NaN}}', "no JSON that can be kept"),
        (b'{"event_type": "x", "data": [1]}', "is to be an object"),
        (b'{"event_type": "x", "data": {"a": "\\udfff"}}', "no JSON that can be kept"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "give 1 to 1000 rewards"),
        (b"{}", "give 1 to 1000 rewards"),
        (b'{"value": NaN}', "finite number"),
        (b'{"value": true}', "finite number"),
        (b'{"value": 1' + b"0" * 400 + b"}", "finite number"),
        (b'{"reward": "1"}', "finite number"),
        (b'"high"', "finite number"),
        (b'{"value": 1, "step": -1}', "`step`"),
        (b'{"value": 1, "step": 1.5}', "`step`"),
        (b'{"value": 1, "name": ""}', "`name`"),
        (b'{"value": 1, "name": "\\ud800"}', "surrogate"),
        (b'{"value": 1, "weight": 2}', "'weight' is no field"),
        (b"[1, 2]", "a reward is an object"),
    ],
)
def test_what_is_no_reward_is_refused(doors: Doors, body: bytes, reason: str) -> None:
    reply = doors.post(REWARDS, body, JSON)
    assert reply.status_code == 400 and reason in json.loads(bytes(reply.body))["error"]["message"]
    assert doors.stored() == []
    assert doors.post(REWARDS, b" " * 100_001, JSON).status_code == 413


@settings(max_examples=60)
@given(
    st.one_of(st.binary(max_size=200), st.sampled_from([GOOD, gzip.compress(GOOD)])),
    st.sampled_from([PROTOBUF, JSON, ARROW, "", "a/b; c"]),
    st.sampled_from(["identity", "gzip", "deflate", "", "zstd"]),
    st.sampled_from([TRACES, BULK, REWARDS]),
)
def test_nothing_that_is_sent_is_a_fault_of_the_door(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, form: str, encoding: str, path: str
) -> None:
    doors = Doors(tmp_path_factory.mktemp("store"))
    for sent in (body, gzip.compress(body) if encoding == "gzip" else body):
        reply = doors.post(path, sent, form, content_encoding=encoding)
        assert reply.status_code in (200, 400, 413, 415)
    assert doors.post(TRACES, GOOD).status_code == 200


def live(
    doors: Doors, desk: Desk, body: bytes, caller: str = "web", **headers: str
) -> tuple[int, str]:
    """What live telemetry of a caller is answered: the status, and what was refused."""

    class Located:
        class locate:
            @staticmethod
            async def remote(*asked: Any) -> Any:
                return desk.locate(*asked, 0.0)

    asked = _request(TRACES, body, {"content-type": PROTOBUF, **headers})
    answer = doors.intake.live(caller, Located, ServingConfig(), "live-run", asked)  # type: ignore[arg-type]
    reply = asyncio.run(answer)
    if reply.status_code != 200:
        return status_of(reply)
    said = ExportTraceServiceResponse.FromString(bytes(reply.body))
    return reply.status_code, said.partial_success.error_message


def test_live_telemetry_goes_to_the_conversation_that_it_names(doors: Doors) -> None:
    desk = Desk("live-run", {}, 60.0)
    other = desk.locate("other", ["header:c"], {}, 0.0)[0]["header:c"]
    body = request(otel_span(1, "named", {"gen_ai.conversation.id": "c"}), otel_span(2, "beside"))
    assert live(doors, desk, body.SerializeToString()) == (200, "")
    rollout = desk.locate("web", ["header:c"], {}, 0.0)[0]["header:c"]
    assert rollout != other
    # By header, by resource, and later spans of a trace that is known.
    for number, (made, headers) in enumerate(
        [
            (request(otel_span(3, trace_id=b"\x09" * 16)), {"x_conversation_id": "c"}),
            (request(otel_span(4), resource={"lightning_ray.rollout_id": rollout}), {}),
            (request(otel_span(5)), {}),
            (request(otel_span(6, trace_id=b"\x08" * 16)), {"x_lightning_ray_rollout": rollout}),
        ],
        3,
    ):
        assert live(doors, desk, made.SerializeToString(), **headers) == (200, "")
        table = asyncio.run(doors.spans.store.read([f"{rollout}/1"]))
        assert table.num_rows == number
    assert set(table["source"].to_pylist()) == {"service"}
    assert set(table["run_id"].to_pylist()) == {"live-run"}


def test_live_telemetry_reaches_no_conversation_of_another_key(doors: Doors) -> None:
    desk = Desk("live-run", {}, 60.0)
    theirs = desk.locate("other", ["header:c"], {}, 0.0)[0]["header:c"]
    claimed = request(otel_span(1, "x", {"lightning_ray.rollout_id": theirs}))
    status, message = live(doors, desk, claimed.SerializeToString())
    assert status == 400 and "no conversation of this key" in message
    status, message = live(doors, desk, GOOD, x_lightning_ray_rollout=theirs)
    assert status == 400 and "no conversation of this key" in message
    status, message = live(doors, desk, GOOD)
    assert status == 400 and "gen_ai.conversation.id" in message
    mixed = request(
        otel_span(1, "x", {"gen_ai.conversation.id": "c"}), otel_span(2, trace_id=b"\7" * 16)
    )
    status, message = live(doors, desk, mixed.SerializeToString())
    assert status == 200 and "1 refused: it names no conversation" in message
    assert asyncio.run(doors.spans.store.read([f"{theirs}/1"])).num_rows == 0
