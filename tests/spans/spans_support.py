"""Spans to store, and reading what a store has on disk."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_ray.spans import SpanKind, span, to_batch
from lightning_ray.spans.archive import KEYS, Archive, Numbers
from lightning_ray.spans.manifests import Sealed
from lightning_ray.spans.segment import SUFFIX, read_segment


def row(span_id: str, attempt_id: str = "r/1", **columns: Any) -> dict[str, Any]:
    """A model call's span with this id."""
    return span(
        SpanKind.MODEL_CALL,
        "/v1/chat/completions",
        run_id="run",
        rollout_id=attempt_id.rpartition("/")[0],
        attempt_id=attempt_id,
        span_id=span_id,
        **columns,
    )


def batch(*span_ids: str, attempt_id: str = "r/1") -> pa.RecordBatch:
    """A batch of spans with these ids."""
    return to_batch([row(span_id, attempt_id, token_ids=[1, 2, 3]) for span_id in span_ids])


def stored_ids(folder: Path) -> list[str]:
    """The span ids in every segment of `folder`, in the order in which they were written."""
    return [
        span_id
        for path in sorted(folder.rglob("*" + SUFFIX))
        for _, found in read_segment(path).batches
        for span_id in found["span_id"].to_pylist()
    ]


def seal(archive: Archive, table: pa.Table, shard: int, segment: int) -> Sealed:
    """Seals a table as if it were a segment."""

    def rows(numbers: Numbers) -> list[pa.RecordBatch]:
        return table.take(pa.array(numbers)).to_batches()

    return archive.seal(table.select(list(KEYS)), rows, shard, segment)
