"""Spans: what happened, durable and columnar.

Owns the schema, the store, its segments on disk and every read of them; it is the only room that
writes files of spans. It must not know what anybody learns from them: no algorithm, no engine.
"""

from lightning_ray.spans.archive import Archive, check_archive
from lightning_ray.spans.client import SpanClient, start_store
from lightning_ray.spans.config import SpansConfig, check_spans
from lightning_ray.spans.conversations import RequestLog, whole_requests
from lightning_ray.spans.query import Query, has_spans, open_dataset, query, querying, read_folder
from lightning_ray.spans.retention import SpansRemoved
from lightning_ray.spans.rows import attempt_id_of, new_span_id, span, to_batch
from lightning_ray.spans.schema import SCHEMA_VERSION, SPAN_SCHEMA, SpanKind, SpanStatus

__all__ = [
    "SCHEMA_VERSION",
    "SPAN_SCHEMA",
    "Archive",
    "Query",
    "RequestLog",
    "SpanClient",
    "SpanKind",
    "SpanStatus",
    "SpansConfig",
    "SpansRemoved",
    "attempt_id_of",
    "check_archive",
    "check_spans",
    "has_spans",
    "new_span_id",
    "open_dataset",
    "query",
    "querying",
    "read_folder",
    "span",
    "start_store",
    "to_batch",
    "whole_requests",
]
