"""Forwarding attempts to MLflow as traces.

Invariant: an attempt is one trace, whose id comes from the run and the attempt. Forwarding again
makes no second trace, span or assessment; it adds what came since, or what a crash left out.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError
from lightning_ray.tracking.mlflow_run import experiment_id_of
from lightning_ray.tracking.recorded import find_mlflow_run
from lightning_ray.tracking.store import open_client, without_password

_FORWARDED = "lightning_ray.spans"
_SPAN = "lightning_ray.span_id"
_TYPES = {"model_call": "CHAT_MODEL", "tool_call": "TOOL", "agent_step": "AGENT"}
_SOURCES = {"person": "HUMAN", "service": "CODE", "grader": "CODE", "agent": "CODE"}
_INPUTS = ("input", "inputs", "messages", "request", "prompt", "arguments")
_OUTPUTS = ("output", "outputs", "response", "completion", "result")
_PLAIN = (
    "kind",
    "agent",
    "role",
    "policy",
    "version",
    "model",
    "tool",
    "finish_reason",
    "sequence",
)


@dataclass(frozen=True)
class Forwarded:
    """What became of an attempt."""

    attempt_id: str
    trace_id: str
    spans: int
    rewards: int
    new: bool
    """False when MLflow had all of it."""


def trace_id_of(run_id: str, attempt_id: str) -> str:
    """The MLflow id of an attempt's trace."""
    digest = hashlib.sha256(json.dumps([run_id, attempt_id]).encode()).hexdigest()
    return f"tr-{digest[:32]}"


def place_for_traces(uri: str, mlflow_run: str | None, name: str, root: Path) -> str:
    """The id of the experiment of a run, or else of the experiment called `name`.

    Raises UserError when the store at `uri` cannot be opened or has no such run.
    """
    client = open_client(uri)
    if mlflow_run is None:
        return experiment_id_of(client, uri, name, root)
    run = find_mlflow_run(client, mlflow_run)
    if run is None:
        raise UserError(f"no MLflow run {mlflow_run} in {without_password(uri)}: set tracking.uri=")
    return str(run.info.experiment_id)


def forward_attempt(
    uri: str, experiment_id: str, spans: Sequence[Mapping[str, Any]], mlflow_run: str | None
) -> Forwarded:
    """Makes a trace of one attempt's spans (rows of SPAN_SCHEMA, by sequence; at least one).

    `mlflow_run` is the run that the trace is linked to. Raises UserError when the store at `uri`
    refuses.
    """
    open_client(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.tracing.client import TracingClient

    first = spans[0]
    trace_id = trace_id_of(first["run_id"], first["attempt_id"])
    rewards = [row for row in spans if row["kind"] in ("reward", "feedback")]
    client = TracingClient(uri)
    try:
        known = _known(client, trace_id)
        if known is not None and known.tags.get(_FORWARDED) == str(len(spans)):
            return Forwarded(first["attempt_id"], trace_id, len(spans), len(rewards), new=False)
        if known is None:
            client.start_trace(_info(trace_id, experiment_id, spans, mlflow_run))
        client.log_spans(experiment_id, _spans(trace_id, spans))
        there = {(one.metadata or {}).get(_SPAN) for one in (known.assessments if known else ())}
        for row in rewards:
            if row["span_id"] not in there:
                client.log_assessment(trace_id, _feedback(trace_id, row))
        client.set_trace_tag(trace_id, _FORWARDED, str(len(spans)))
    except (MlflowException, NotImplementedError) as error:
        reason = without_password(str(error).splitlines()[0])
        raise UserError(f"MLflow at {without_password(uri)} takes no trace: {reason}") from error
    return Forwarded(first["attempt_id"], trace_id, len(spans), len(rewards), new=True)


def _known(client: Any, trace_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_trace_info(trace_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            return None
        raise


def _bounds(spans: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    start = min(row["start_ns"] for row in spans)
    return start, max(start, *(row["end_ns"] for row in spans))


def _info(
    trace_id: str, experiment_id: str, spans: Sequence[Mapping[str, Any]], run: str | None
) -> Any:
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    start, end = _bounds(spans)
    first = spans[0]
    metadata = {
        f"lightning_ray.{key}": first[key] for key in ("run_id", "rollout_id", "attempt_id")
    }
    if run is not None:
        metadata["mlflow.sourceRun"] = run
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=start // 1_000_000,
        execution_duration=(end - start) // 1_000_000,
        state=TraceState.ERROR if _failed(spans) else TraceState.OK,
        trace_metadata=metadata,
        tags={"mlflow.traceName": first["attempt_id"]},
    )


def _failed(spans: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the attempt failed: how it was run says so, or else any of its spans."""
    ends = [row for row in spans if row["kind"] == "resource"] or spans
    return any(row["status"] == "error" for row in ends)


def _spans(trace_id: str, spans: Sequence[Mapping[str, Any]]) -> list[Any]:
    from mlflow.entities import Span

    start, end = _bounds(spans)
    shown = [row for row in spans if row["kind"] not in ("reward", "feedback")]
    ids = {row["span_id"] for row in shown}
    root = _id(trace_id + "/root")

    def made(
        span_id: str, parent: str, name: str, times: tuple[int, int], failed: bool, values: Any
    ) -> Any:
        attributes = {"mlflow.traceRequestId": trace_id} | values
        return Span.from_dict(
            {
                "trace_id": trace_id,
                "span_id": span_id,
                "parent_span_id": parent,
                "name": name,
                "start_time_unix_nano": times[0],
                "end_time_unix_nano": times[1],
                "status": {"code": "ERROR" if failed else "OK", "message": ""},
                "attributes": {
                    key: json.dumps(value, ensure_ascii=False)
                    for key, value in attributes.items()
                    if value is not None
                },
                "events": [],
            }
        )

    found = [
        made(
            root,
            "",
            spans[0]["attempt_id"],
            (start, end),
            _failed(spans),
            {"mlflow.spanType": "AGENT"},
        )
    ]
    for row in shown:
        parent = row["parent_span_id"]
        found.append(
            made(
                _id(row["span_id"]),
                _id(parent) if parent in ids and parent != row["span_id"] else root,
                row["name"] or row["kind"],
                (row["start_ns"], max(row["start_ns"], row["end_ns"])),
                row["status"] != "ok",
                _attributes(row),
            )
        )
    return found


def _attributes(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {f"lightning_ray.{key}": row[key] for key in _PLAIN}
    values["mlflow.spanType"] = _TYPES.get(row["kind"], "UNKNOWN")
    extra = json.loads(row["attributes"]) if row["attributes"] else {}
    if not isinstance(extra, dict):
        extra = {"value": extra}
    values |= extra
    values["mlflow.spanInputs"] = next((extra[key] for key in _INPUTS if key in extra), None)
    values["mlflow.spanOutputs"] = next((extra[key] for key in _OUTPUTS if key in extra), None)
    values["mlflow.llm.model"] = row["model"]
    sampled = len(row["logprobs"] or ())
    given, taken = row["input_tokens"], row["output_tokens"]
    if row["kind"] == "model_call" and row["token_ids"] is not None:
        total = (row["prefix_tokens"] or 0) + len(row["token_ids"])
        given = total - sampled if given is None else given
        taken = sampled if taken is None else taken
    if given is not None and taken is not None:
        values["mlflow.chat.tokenUsage"] = {
            "input_tokens": given,
            "output_tokens": taken,
            "total_tokens": given + taken,
        }
    if row["cost_usd"] is not None:
        values["mlflow.llm.cost"] = {"total_cost": row["cost_usd"]}
    return values


def _feedback(trace_id: str, row: Mapping[str, Any]) -> Any:
    from mlflow.entities import AssessmentSource, Feedback

    source = row["source"] or "grader"
    metadata = {_SPAN: row["span_id"]}
    if row["step"] is not None:
        metadata["lightning_ray.step"] = str(row["step"])
    value = row["value"] if row["value"] is not None else row["attributes"] or row["name"]
    return Feedback(
        name=row["name"],
        value=value,
        source=AssessmentSource(source_type=_SOURCES.get(source, "CODE"), source_id=source),
        trace_id=trace_id,
        metadata=metadata,
        create_time_ms=row["end_ns"] // 1_000_000,
        last_update_time_ms=row["end_ns"] // 1_000_000,
    )


def _id(text: str) -> str:
    """An OpenTelemetry span id: the span's own, or, where that is none, made from it."""
    own = len(text) == 16 and all(c in "0123456789abcdef" for c in text) and text != "0" * 16
    return text if own else hashlib.sha256(text.encode()).hexdigest()[:16]
