"""Attempts forwarded to MLflow, in a database and on a server."""

import os
import socket
import subprocess
import sys
import time

import pytest

from lightning_ray.errors import UserError
from lightning_ray.spans import SpanKind, SpanStatus, span, to_batch
from lightning_ray.tracking.store import default_uri, open_client
from lightning_ray.tracking.traces import forward_attempt


def rows():
    where = {"run_id": "run", "rollout_id": "r", "attempt_id": "r/1"}
    made = [
        span(SpanKind.AGENT_STEP, "plan", **where, span_id="a" * 16),
        span(
            SpanKind.MODEL_CALL,
            "/v1/chat/completions",
            **where,
            span_id="call",
            parent_span_id="a" * 16,
            model="m",
            token_ids=[1, 2, 3],
            logprobs=[-0.5],
            attributes={"messages": [{"role": "user", "content": "grüß"}], "response": "42"},
        ),
        span(SpanKind.TOOL_CALL, "search", **where, status=SpanStatus.ERROR, tool="search"),
        span(SpanKind.REWARD, "exact", **where, value=0.5, source="person", step=1),
    ]
    return to_batch(made).to_pylist()


def _check(uri):
    client = open_client(uri)
    experiment = client.create_experiment("forwarded")
    run = client.create_run(experiment).info.run_id
    spans = rows()
    first = forward_attempt(uri, experiment, spans, run)
    assert first.new and (first.spans, first.rewards) == (4, 1)
    assert not forward_attempt(uri, experiment, spans, run).new
    late = spans[3] | {"span_id": "late", "name": "style", "value": 1.0}
    assert forward_attempt(uri, experiment, [*spans, late], run).new
    (trace,) = client.search_traces(locations=[experiment])
    assert trace.info.trace_metadata["mlflow.sourceRun"] == run
    assert {a.name: a.value for a in trace.info.assessments} == {"exact": 0.5, "style": 1.0}
    assert len(trace.info.assessments) == 2
    (exact,) = [a for a in trace.info.assessments if a.name == "exact"]
    assert exact.source.source_type == "HUMAN"
    found = {one.name: one for one in trace.data.spans}
    assert len(trace.data.spans) == 4
    assert found["r/1"].parent_id is None and found["plan"].parent_id == found["r/1"].span_id
    call = found["/v1/chat/completions"]
    assert call.parent_id == "a" * 16 and call.outputs == "42"
    assert call.inputs == [{"role": "user", "content": "grüß"}]
    assert call.get_attribute("mlflow.chat.tokenUsage")["input_tokens"] == 2
    assert found["search"].status.status_code.value == "ERROR"


def test_a_database(tmp_path):
    _check(default_uri(tmp_path))


@pytest.mark.slow
def test_a_server(tmp_path):
    open_client(default_uri(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri"]
    command += [default_uri(tmp_path), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(tmp_path / "artifacts")]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.3)
        _check(f"http://127.0.0.1:{port}")
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def test_a_store_that_refuses(tmp_path):
    with pytest.raises(UserError, match="takes no trace"):
        forward_attempt(default_uri(tmp_path), "99", rows(), None)
