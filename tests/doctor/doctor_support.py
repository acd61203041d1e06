"""Spans, runs and requests made by hand, as the store, the workers and the tap would leave them."""

import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from lightning_ray.agents import AgentConfig
from lightning_ray.doctor.evidence import Evidence, runs_of
from lightning_ray.doctor.exchange import Asked, Exchange
from lightning_ray.doctor.finding import Finding
from lightning_ray.spans import SPAN_SCHEMA, SpanKind, SpanStatus, span

_numbers = itertools.count(1)


def place(attempt: str) -> dict[str, str]:
    return {"run_id": "run", "rollout_id": attempt.rpartition("/")[0], "attempt_id": attempt}


def ended(attempt: str = "a/1", task: str = "t", **told: Any) -> dict[str, Any]:
    """The span of an attempt that went well, but for what `told` says."""
    attributes = {
        "task_id": task,
        "status": "succeeded",
        "stdout": "42",
        "error": "",
        "end": "exited",
        "exit_code": 0,
        "seconds": 1.0,
        "cpu_seconds": 0.5,
        "warm": False,
        "stderr": "",
    }
    return span(SpanKind.RESOURCE, "attempt", **place(attempt), attributes=attributes | told)


def failed(attempt: str = "a/1", stderr: str = "boom", task: str = "t") -> dict[str, Any]:
    """The span of an attempt whose agent exited with 1."""
    error = f"exit code 1\n{stderr}"
    return ended(attempt, task, status="failed", exit_code=1, stderr=stderr, error=error, stdout="")


def rewarded(attempt: str, value: float) -> dict[str, Any]:
    return span(SpanKind.REWARD, "reward", **place(attempt), value=value)


def call(
    attempt: str = "a/1",
    prompt: Sequence[int] = (1, 2, 3),
    sampled: Sequence[int] = (4, 5),
    *,
    status: SpanStatus = SpanStatus.OK,
    finish_reason: str = "stop",
    sampling: dict[str, Any] | None = None,
    **columns: Any,
) -> dict[str, Any]:
    """The span of a model call, stored whole."""
    row = span(
        SpanKind.MODEL_CALL,
        "/v1/chat/completions",
        **place(attempt),
        status=status,
        attributes={
            "prompt_tokens": len(prompt),
            "sampling": {"temperature": 1.0, "max_tokens": 20, "n": 1} | (sampling or {}),
        },
        **{
            "role": "gpt-4o-mini",
            "policy": "policy",
            "version": 0,
            "prefix_tokens": 0,
            "token_ids": [*prompt, *sampled],
            "logprobs": [-0.5] * len(sampled),
            "finish_reason": finish_reason,
        }
        | columns,
    )
    return row | {"sequence": next(_numbers)}


def asked(
    attempt: str = "a/1",
    path: str = "/v1/chat/completions",
    status: int | None = 200,
    error: str = "",
    tool_calls: int = 0,
    method: str = "POST",
    **what: Any,
) -> Exchange:
    """A request and its answer."""
    fields: dict[str, Any] = {"model": "gpt-4o-mini", "messages": ("m1",), "replies": (False,)}
    return Exchange(attempt, method, path, Asked(**fields | what), status, error, tool_calls)


def evidence(
    rows: Sequence[dict[str, Any]],
    exchanges: Sequence[Exchange] = (),
    command: Sequence[str] = ("python", "agent.py"),
    agent: dict[str, Any] | None = None,
    **more: Any,
) -> Evidence:
    """What the checks judge, from span rows and requests."""
    spans = pa.Table.from_pylist(list(rows), SPAN_SCHEMA)
    config = AgentConfig(name="agent", command=list(command), grader="g", **(agent or {}))
    return Evidence(config, runs_of(spans), exchanges, spans, **more)


def only(findings: Sequence[Finding], title: str) -> Finding:
    """The one finding with this title."""
    found = [finding for finding in findings if finding.title == title]
    assert len(found) == 1, f"{title}: {found}"
    return found[0]
