"""Telemetry and rewards through the real door, from an OpenTelemetry SDK and from nobody good."""

import gzip
import http.client
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from doors import OpenDoor, open_door
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from telemetry_support import arrow_stream, as_json, otel_span, request

from lightning_ray.agents import attempt_environment
from lightning_ray.gateway import GatewayConfig, ServingConfig
from lightning_ray.rollouts import AttemptOutcome, AttemptStatus, RolloutsConfig
from lightning_ray.rollouts.types import Lease
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.rewards import by_attempt, reward_history
from lightning_ray.trajectories import rebuild_trees

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
LINGER_S = 3.0
KEY = "the key of one caller"
ENGINE_KEY = "the key of somebody with engines"


class Door:
    """The gateway, its queue and its store."""

    def __init__(self, door: OpenDoor):
        self.url, self.store, self.lease = door.url, door.store, door.lease
        self._port = door.port
        self._queue = door.queue

    def finish(self, lease: Lease) -> None:
        """Ends an attempt well."""
        outcome = AttemptOutcome(AttemptStatus.SUCCEEDED)
        assert ray.get(self._queue.actor.finish.remote(lease.attempt_id, outcome), timeout=10)

    def base(self, lease: Lease) -> str:
        return f"{self.url}/a/{lease.capability}"

    def post(
        self, path: str, body: bytes, content_type: str = PROTOBUF, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """What a POST is answered: status, body, headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, body, {"content-type": content_type, **named})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, content, {n.lower(): v for n, v in reply.getheaders()}

    def rows(self, attempt_id: str) -> list[dict[str, Any]]:
        return self.store.get([attempt_id]).to_pylist()


@pytest.fixture(scope="module")
def door(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    config = GatewayConfig(
        max_body_bytes=200_000, telemetry=TelemetryLimits(max_decoded_bytes=1_000_000)
    )
    with open_door(
        tmp_path_factory.mktemp("door"),
        config,
        rollouts=RolloutsConfig(linger_s=LINGER_S),
        keys={"web": KEY, "engine": ENGINE_KEY},
        serving=ServingConfig(recorders=["engine"]),
    ) as door:
        yield Door(door)


AGENT = textwrap.dedent(
    """
    import json, os, urllib.request
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("agent")
    with tracer.start_as_current_span("invoke_agent me") as agent:
        agent.set_attribute("gen_ai.operation.name", "invoke_agent")
        agent.set_attribute("gen_ai.agent.name", "me")
        with tracer.start_as_current_span("execute_tool add") as tool:
            tool.set_attribute("gen_ai.operation.name", "execute_tool")
            tool.set_attribute("gen_ai.tool.name", "add")
    body = json.dumps({"value": 0.5, "step": 1}).encode()
    urllib.request.urlopen(os.environ["LIGHTNING_RAY_REWARD_URL"], body).read()
    provider.shutdown()
    """
)


def test_an_instrumented_agent_needs_nothing_but_its_environment(
    door: Door, tmp_path: Path
) -> None:
    lease = door.lease()
    (tmp_path / "agent.py").write_text(AGENT)
    done = subprocess.run(
        [sys.executable, "agent.py"],
        cwd=tmp_path,
        env=attempt_environment(door.base(lease), "key"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row["name"]: row for row in door.rows(lease.attempt_id)}
    agent, tool, reward = rows["invoke_agent me"], rows["execute_tool add"], rows["reward"]
    assert (agent["kind"], agent["agent"]) == ("agent_step", "me")
    assert (tool["kind"], tool["tool"]) == ("tool_call", "add")
    assert tool["parent_span_id"] == agent["span_id"] and tool["trace_id"] == agent["trace_id"]
    assert agent["start_ns"] <= tool["start_ns"] <= tool["end_ns"] <= agent["end_ns"]
    assert (reward["value"], reward["step"], reward["source"]) == (0.5, 1, "agent")
    resource = json.loads(tool["attributes"])["otel"]["resource"]
    assert resource["telemetry.sdk.language"] == "python"


def test_what_a_batch_exporter_sends_after_the_end_still_finds_its_attempt(door: Door) -> None:
    lease = door.lease()
    # Slow enough that it sends nothing before it is told to shut down, as at a process's end.
    exporter = OTLPSpanExporter(f"{door.base(lease)}/v1/traces", compression=None)
    provider = TracerProvider(resource=Resource.create({"service.name": "late"}))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    with provider.get_tracer("agent").start_as_current_span("work"):
        door.finish(lease)
    # Ended: no model call passes, telemetry and rewards do, for a while.
    status, _, _ = door.post(f"/a/{lease.capability}/v1/chat/completions", b"{}", JSON)
    assert status == 401
    provider.shutdown()
    assert [row["name"] for row in door.rows(lease.attempt_id)] == ["work"]
    assert door.post(f"/a/{lease.capability}/v1/rewards", b"1", JSON)[0] == 200
    deadline = time.monotonic() + 60
    while door.post(f"/a/{lease.capability}/v1/rewards", b"2", JSON)[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status, body, _ = door.post(f"/a/{lease.capability}/v1/traces", b"")
    assert status == 401 and "no attempt" in Status.FromString(body).message


def test_an_attempts_spans_land_in_it_in_every_encoding(door: Door) -> None:
    lease, other = door.lease(), door.lease()
    path = f"/a/{lease.capability}"
    claim = {"lightning_ray.rollout_id": other.rollout_id}
    made = [request(otel_span(n, f"s{n}", claim)) for n in (1, 2)]
    assert door.post(f"{path}/v1/traces", as_json(made[0]), JSON)[:2] == (200, b"{}")
    body = gzip.compress(made[1].SerializeToString())
    status, content, headers = door.post(f"{path}/v1/traces", body, content_encoding="gzip")
    assert (status, content, headers["content-type"]) == (200, b"", PROTOBUF)
    rows = 5000
    table = pa.table(
        {
            "span_id": [f"{n + 100:016x}" for n in range(rows)],
            "kind": ["agent_step"] * rows,
            "name": ["bulk"] * rows,
            "attempt_id": [other.attempt_id] * rows,
        }
    )
    stream = gzip.compress(arrow_stream(table))
    arrow = "application/vnd.apache.arrow.stream"
    assert door.post(f"{path}/v1/spans", stream, arrow, content_encoding="gzip")[0] == 200
    assert len(door.rows(lease.attempt_id)) == 2 + rows
    assert door.rows(other.attempt_id) == []


def test_the_door_survives_what_is_sent_to_it(door: Door) -> None:
    lease = door.lease()
    path = f"/a/{lease.capability}/v1/traces"
    bomb = gzip.compress(b"\0" * 100_000_000)
    many = request(*(Span() for _ in range(10_001))).SerializeToString()
    for body, headers, expected in (
        (b"\xff" * 1000, {}, 400),
        (many, {}, 413),
        (b"x" * 200_001, {}, 413),
        (bomb, {"content_encoding": "gzip"}, 413),
        (bomb[:300], {"content_encoding": "gzip"}, 400),
        (b"x", {"content_encoding": "br"}, 415),
    ):
        status, content, answered = door.post(path, body, **headers)
        assert status == expected and answered["content-type"] == PROTOBUF
        assert Status.FromString(content).message
    for body in (b"[" * 100_000, b"{", b'{"resourceSpans": 1}', b'"' + b"[" * 1000 + b'"'):
        status, content, _ = door.post(path, body, JSON)
        assert status in (400, 413) and json.loads(content)["message"]
    assert door.post(path, b"", "text/plain")[0] == 415
    assert door.post("/a/guess/v1/traces", b"")[0] == 401
    good = request(otel_span(77)).SerializeToString()
    assert door.post(path, good)[0] == 200
    assert [row["span_id"] for row in door.rows(lease.attempt_id)] == ["000000000000004d"]


def test_rewards_come_from_many_and_the_last_holds(door: Door) -> None:
    lease = door.lease()
    for body in (b"0.25", b'{"reward": 0.5, "style": 1}', b'[{"value": 1, "step": 2}]'):
        assert door.post(f"/a/{lease.capability}/v1/rewards", body, JSON)[0] == 200
    table = door.store.get([lease.attempt_id])
    assert by_attempt(table) == {lease.attempt_id: {"reward": 0.5, "style": 1.0}}
    assert reward_history(table).num_rows == 4
    assert door.post(f"/a/{lease.capability}/v1/rewards", b"{", JSON)[0] == 400


def test_live_telemetry_needs_a_key_and_a_conversation_of_that_key(door: Door) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    made = request(otel_span(901, "x", {"gen_ai.conversation.id": "talk"}, trace_id=b"\x0b" * 16))
    assert door.post("/v1/traces", made.SerializeToString())[0] == 401
    assert door.post("/v1/traces", made.SerializeToString(), **key)[0] == 200
    nameless = request(otel_span(902, trace_id=b"\x0c" * 16)).SerializeToString()
    status, content, _ = door.post("/v1/traces", nameless, **key)
    assert status == 400 and "names no conversation" in Status.FromString(content).message
    status, content, _ = door.post(
        "/v1/traces", nameless, **key, x_lightning_ray_rollout="live-00000000-1"
    )
    assert status == 400 and "no conversation of this key" in Status.FromString(content).message


def test_calls_of_somebody_elses_engine_are_stored_with_their_exact_tokens(door: Door) -> None:
    engine, web = ({"authorization": f"Bearer {key}"} for key in (ENGINE_KEY, KEY))
    first, second = "00000000000000aa", "00000000000000ab"
    rows = {
        "span_id": [first, second, "00000000000000ac"],
        "kind": ["model_call", "model_call", "reward"],
        "name": ["chat", "chat", "reward"],
        "rollout_id": ["call-7"] * 3,
        "policy": ["policy", "policy", None],
        "version": pa.array([4, 4, None], pa.int32()),
        "token_ids": pa.array([[5, 6, 7], [8, 9], None], pa.list_(pa.int32())),
        "logprobs": pa.array([[-0.5], [-0.25], None], pa.list_(pa.float32())),
        "continues": [None, first, None],
        "prefix_tokens": pa.array([0, 3, None], pa.int32()),
        "value": pa.array([None, None, 1.0], pa.float64()),
    }
    body = arrow_stream(pa.table(rows))
    arrow = "application/vnd.apache.arrow.stream"
    for headers, expected, why in (
        ({}, 401, "serving.keys"),
        (web, 403, "web records no spans here (serving.recorders)"),
        (engine | {"content_type": PROTOBUF}, 415, arrow),
    ):
        form = headers.pop("content_type", arrow) if headers else arrow
        status, content, _ = door.post("/v1/spans", body, form, **headers)
        assert status == expected and why in json.loads(content)["message"]
    for _ in range(2):
        # Sent again, it is the same rollout, and stored once.
        status, content, headers = door.post("/v1/spans", body, arrow, **engine)
        assert (status, content) == (200, b"{}")
    rollout = headers["x-lightning-ray-rollout-prefix"] + "call-7"
    (tree,), inexact = rebuild_trees(door.store.rollout(rollout))
    assert inexact == {}
    assert [call.tokens.tolist() for call in tree.calls] == [[5, 6, 7], [5, 6, 7, 8, 9]]
    assert by_attempt(door.store.rollout(rollout)) == {f"{rollout}/1": {"reward": 1.0}}
    said = json.dumps({"rollout": rollout, "verdict": "override", "reward": 0}).encode()
    assert door.post("/v1/feedback", said, JSON, **web)[0] == 404
    assert door.post("/v1/feedback", said, JSON, **engine)[0] == 200
    assert by_attempt(door.store.rollout(rollout)) == {f"{rollout}/1": {"reward": 0.0}}
    forged = arrow_stream(pa.table(rows | {"policy": ["policy", "other", None]}))
    said = json.loads(door.post("/v1/spans", forged, arrow, **engine)[1])
    assert said["partialSuccess"]["rejectedSpans"] == "1"
