"""Making spans: plain values in, record batches of SPAN_SCHEMA out."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lightning_ray.spans.schema import SPAN_SCHEMA, SpanKind, SpanStatus


def new_span_id() -> str:
    """A random id of 16 hex digits, as OpenTelemetry's span ids are."""
    return secrets.token_hex(8)


def attempt_id_of(rollout_id: str, number: int) -> str:
    """The id of a rollout's attempt `number`, which counts from 1."""
    return f"{rollout_id}/{number}"


def span(
    kind: SpanKind,
    name: str,
    *,
    run_id: str,
    rollout_id: str,
    attempt_id: str,
    status: SpanStatus = SpanStatus.OK,
    start_ns: int | None = None,
    end_ns: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    **columns: Any,
) -> dict[str, Any]:
    """One span as a row. Times default to now; `sequence` is the store's to give.

    `columns` are further columns of SPAN_SCHEMA (policy, version, token_ids, value, ...); raises
    KeyError for one that the schema does not have.
    """
    now = time.time_ns()
    for column in columns:
        if column not in _COLUMNS:
            raise KeyError(f"SPAN_SCHEMA has no column {column!r}")
    return {
        "span_id": new_span_id(),
        **columns,
        "kind": kind.value,
        "name": name,
        "run_id": run_id,
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence": 0,
        "start_ns": now if start_ns is None else start_ns,
        "end_ns": now if end_ns is None else end_ns,
        "status": status.value,
        "attributes": json.dumps(attributes, default=str) if attributes else None,
    }


_COLUMNS = frozenset(SPAN_SCHEMA.names)


def to_batch(rows: Sequence[Mapping[str, Any]] | pa.RecordBatch) -> pa.RecordBatch:
    """Rows made by `span` as one record batch of SPAN_SCHEMA; such a batch as it is."""
    if isinstance(rows, pa.RecordBatch):
        return rows
    return pa.RecordBatch.from_pylist(list(rows), schema=SPAN_SCHEMA)
