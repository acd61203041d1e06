"""The span store: an actor that owns the segments of one run and answers reads from them.

Invariants: an append is answered after its spans are on disk; a span id is stored once, so a
writer may repeat an append whose answer it did not get; `sequence` numbers the spans of an attempt
1, 2, 3, ... in the order in which they arrived. A restarted store reads its segments and goes on.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.config import SpansConfig
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.segment import (
    SUFFIX,
    BatchPlace,
    SegmentWriter,
    read_batch,
    read_segment,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreStats:
    """What a store holds."""

    spans: int
    attempts: int
    segments: int
    bytes: int
    duplicates: int
    """Spans that were sent again and not stored twice."""
    lost_bytes: int
    """Bytes of torn batches that no writer was ever told were stored."""


class SpanStore:
    """The store's state and files; run as a Ray actor (`spans.client.start_store`)."""

    def __init__(self, folder: str, config: SpansConfig):
        """Opens `folder` (made if it is missing) and indexes the segments in it."""
        self._folder = Path(folder)
        self._config = config
        self._folder.mkdir(parents=True, exist_ok=True)
        self._seen: set[str] = set()
        self._sequence: defaultdict[str, int] = defaultdict(int)
        self._places: defaultdict[str, list[BatchPlace]] = defaultdict(list)
        self._duplicates = 0
        self._lost_bytes = 0
        self._closed_bytes = 0
        self._recover()
        self._writer = self._next_segment()
        self._pending: list[tuple[pa.RecordBatch, asyncio.Future[int]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False

    async def append(self, batch: pa.RecordBatch) -> int:
        """Stores the spans of `batch` (SPAN_SCHEMA); returns how many were new.

        Returns once they are on disk; concurrent appends share one fsync. Raises
        InfrastructureError when the disk refuses; nothing of the batch is stored then.
        """
        if self._closed:
            raise InfrastructureError(f"the span store of {self._folder} is closed")
        if not batch.schema.equals(SPAN_SCHEMA):
            raise ValueError("a batch of spans has the columns of SPAN_SCHEMA")
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending.append((batch, stored))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return await stored

    async def read(self, attempt_ids: Sequence[str]) -> pa.Table:
        """The spans of these attempts, each attempt's in order of `sequence`.

        Called through Ray, the table goes to the object store and the caller may pass its
        reference on without fetching it.
        """
        places = {place: None for attempt in attempt_ids for place in self._places.get(attempt, ())}
        wanted = pa.array(list(attempt_ids), pa.string())
        return await asyncio.to_thread(_gather, list(places), wanted)

    async def attempts(self, rollout_id: str) -> list[str]:
        """The ids of a rollout's attempts that have spans."""
        return sorted(a for a in self._places if a.rpartition("/")[0] == rollout_id)

    async def stats(self) -> StoreStats:
        """What the store holds now."""
        return StoreStats(
            spans=len(self._seen),
            attempts=len(self._places),
            segments=len(list(self._folder.glob("*" + SUFFIX))),
            bytes=self._closed_bytes + self._writer.size,
            duplicates=self._duplicates,
            lost_bytes=self._lost_bytes,
        )

    async def close(self) -> None:
        """Waits for what is being written and closes the segment; later appends are refused."""
        self._closed = True
        while self._flushing is not None and not self._flushing.done():
            await self._flushing
        self._writer.close()

    async def _flush(self) -> None:
        while self._pending:
            waiting, self._pending = self._pending, []
            merged, new = self._merge([batch for batch, _ in waiting])
            failure = None
            try:
                if merged.num_rows:
                    place = await asyncio.to_thread(self._write, merged)
                    self._index(merged, place)
            except OSError as error:
                self._forget(merged)
                reason = f"spans could not be written to {self._folder}: {error.strerror or error}"
                failure = InfrastructureError(reason)
            for (_, stored), count in zip(waiting, new, strict=True):
                if stored.cancelled():
                    continue
                if failure is None:
                    stored.set_result(count)
                else:
                    stored.set_exception(failure)

    def _merge(self, batches: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, list[int]]:
        """One batch of the new spans with their sequence numbers, and how many each brought."""
        keep: list[int] = []
        numbers: list[int] = []
        new: list[int] = []
        start = 0
        for batch in batches:
            ids = zip(batch["span_id"].to_pylist(), batch["attempt_id"].to_pylist(), strict=True)
            before = len(keep)
            for row, (span_id, attempt) in enumerate(ids, start):
                if span_id in self._seen:
                    self._duplicates += 1
                    continue
                self._seen.add(span_id)
                self._sequence[attempt] += 1
                keep.append(row)
                numbers.append(self._sequence[attempt])
            new.append(len(keep) - before)
            start += batch.num_rows
        table = pa.Table.from_batches(batches, SPAN_SCHEMA)
        table = table.take(pa.array(keep, pa.int64()))
        place = SPAN_SCHEMA.get_field_index("sequence")
        table = table.set_column(place, SPAN_SCHEMA.field(place), pa.array(numbers, pa.int64()))
        return (table.combine_chunks().to_batches()[0] if keep else _EMPTY), new

    def _write(self, batch: pa.RecordBatch) -> BatchPlace:
        if self._writer.closed or self._writer.size > self._config.segment_bytes:
            # Made first: on a disk that has no room for it, this one stays in use.
            successor = self._next_segment()
            self._closed_bytes += self._writer.size
            self._writer.close()
            self._writer = successor
        return self._writer.append(batch)

    def _index(self, batch: pa.RecordBatch, place: BatchPlace) -> None:
        for attempt in pc.unique(batch["attempt_id"]).to_pylist():
            self._places[attempt].append(place)

    def _forget(self, batch: pa.RecordBatch) -> None:
        """Undoes `_merge` for a batch that did not reach the disk, so that it may be sent again."""
        self._seen.difference_update(batch["span_id"].to_pylist())
        for attempt in batch["attempt_id"].to_pylist():
            self._sequence[attempt] -= 1

    def _recover(self) -> None:
        for path in sorted(self._folder.glob("*" + SUFFIX)):
            scan = read_segment(path)
            self._lost_bytes += scan.lost_bytes
            self._closed_bytes += path.stat().st_size
            for place, batch in scan.batches:
                self._index(batch, place)
                self._seen.update(batch["span_id"].to_pylist())
                for attempt, number in zip(
                    batch["attempt_id"].to_pylist(), batch["sequence"].to_pylist(), strict=True
                ):
                    self._sequence[attempt] = max(self._sequence[attempt], number)

    def _next_segment(self) -> SegmentWriter:
        # Always a new file: a torn tail of the last process stays as it is, for whoever asks.
        taken = [int(path.stem) for path in self._folder.glob("*" + SUFFIX)]
        return SegmentWriter(self._folder / f"{max(taken, default=0) + 1:08d}{SUFFIX}")


_EMPTY = pa.RecordBatch.from_pylist([], schema=SPAN_SCHEMA)


def _gather(places: Sequence[BatchPlace], attempts: pa.Array) -> pa.Table:
    batches = []
    for place in places:
        batch = read_batch(place)
        batches.append(batch.filter(pc.is_in(batch["attempt_id"], value_set=attempts)))
    table = pa.Table.from_batches(batches, SPAN_SCHEMA)
    # Appends of one attempt never overtake each other, but its batches may be asked for in any
    # order; a stable order costs little and nothing downstream has to think of it.
    order = np.lexsort((table["sequence"].to_numpy(), _codes(table["attempt_id"])))
    return table.take(pa.array(order))


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Integers that are equal where the strings are, numbered by first appearance."""
    if len(column) == 0:
        return np.empty(0, np.int32)
    return column.combine_chunks().dictionary_encode().indices.to_numpy()
