"""One shard of the span store: an actor that owns its segments and answers reads from them.

Invariants: an append is answered after its spans are on disk; a span of an attempt is stored once,
so a writer may repeat an append whose answer it did not get; `sequence` numbers the spans of an
attempt 1, 2, 3, ... in the order in which they arrived. A restarted store reads its segments and
goes on.
"""

import asyncio
import logging
import os
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.config import SpansConfig
from lightning_ray.spans.index import SpanIndex, names_of, split_places
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.segments import Segments

log = logging.getLogger(__name__)

_SEQUENCE = SPAN_SCHEMA.get_field_index("sequence")
_REMEMBERED = 1 << 16
"""Attempts whose last sequence number is kept in memory; of others it is read from the disk."""
PART_ROWS = 1 << 16
"""Rows that one part of a scan looks at."""
_HEARD = 4096
"""Flushes whose attempts are remembered for `activity`."""


@dataclass(frozen=True)
class StoreStats:
    """What a store holds."""

    spans: int
    segments: int
    bytes: int
    duplicates: int
    """Spans that were sent again and not stored twice, since this process began."""
    lost_bytes: int
    """Bytes of torn batches that no writer was ever told were stored."""
    damaged_bytes: int
    """Bytes that changed on disk beyond mending, or are missing: spans were lost there."""
    mended_bytes: int
    """Bytes that had changed on disk and were put right."""

    def __add__(self, other: "StoreStats") -> "StoreStats":
        mine, others = vars(self), vars(other)
        return StoreStats(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class Heard:
    """Where a listener of `activity` stands: which process it listened to, and how far."""

    process: str
    flush: int


class SpanStore:
    """The state and files of one shard; run as a Ray actor (`spans.client.start_store`)."""

    def __init__(self, folder: str, config: SpansConfig):
        """Opens `folder` (made if it is missing) and indexes the segments in it.

        Raises InfrastructureError when something in it cannot be read.
        """
        self._folder = Path(folder)
        self._segments = Segments(self._folder, config.segment_bytes)
        self._index = SpanIndex()
        self._last: OrderedDict[str, int] = OrderedDict()
        self._duplicates = 0
        for first, batch in self._segments.recover():
            self._index.add(batch, first)
        self._pending: list[tuple[pa.RecordBatch, asyncio.Future[int]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False
        self._process = secrets.token_hex(4)
        self._flushes = 0
        self._heard: deque[tuple[int, list[str]]] = deque(maxlen=_HEARD)
        self._news = asyncio.Event()

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
        """The spans of these attempts, in the order asked, each attempt's by `sequence`.

        Called through Ray, the table goes to the object store and the caller may pass its
        reference on without fetching it.
        """
        rollouts = [rollout_of(attempt) for attempt in attempt_ids]
        places = self._places(rollouts)
        return await asyncio.to_thread(self._gather, places, "attempt_id", attempt_ids)

    async def rollouts(self, rollout_ids: Sequence[str]) -> pa.Table:
        """The spans of every attempt of these rollouts, in the order asked, by attempt."""
        places = self._places(rollout_ids)
        return await asyncio.to_thread(self._gather, places, "rollout_id", rollout_ids)

    async def parts(self) -> list[tuple[int, int]]:
        """What `scan` can be asked for: segments, each in pieces (number, first row)."""
        return [
            (number, first)
            for number, segment in sorted(self._segments.known.items())
            for first in range(0, segment.rows, PART_ROWS)
        ]

    async def scan(
        self, part: tuple[int, int], columns: Sequence[str] | None, where: pc.Expression | None
    ) -> pa.Table:
        """One part's rows for which the expression holds, in order of arrival."""
        return await asyncio.to_thread(self._scan, part, columns, where)

    async def tail(
        self, after: int, limit: int, timeout_s: float, run_id: str | None = None
    ) -> tuple[int, pa.Table]:
        """Spans stored behind the place `after` (0 at first), and the place to go on from.

        Waits up to `timeout_s` seconds for the first one; at most `limit` rows are looked at. With
        `run_id` those of other runs are left out.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            news = self._news
            after, table = await asyncio.to_thread(self._behind, after, limit)
            if run_id is not None and table.num_rows:
                table = table.filter(pc.equal(table["run_id"], run_id))
            if table.num_rows or not await _within(news, deadline):
                return after, table

    async def activity(self, since: Heard | None, timeout_s: float) -> tuple[Heard, list[str]]:
        """The attempts that got spans since then, waiting up to `timeout_s` seconds for the first.

        With None, or a place in the life of another process, all that this one remembers.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        start = since.flush if since is not None and since.process == self._process else 0
        while self._flushes <= start:
            if not await _within(self._news, deadline):
                break
        heard = {
            attempt: None for flush, names in self._heard if flush > start for attempt in names
        }
        return Heard(self._process, self._flushes), list(heard)

    async def stats(self) -> StoreStats:
        """What the store holds now."""
        damage = self._segments.damage
        return StoreStats(
            spans=self._index.spans,
            segments=len(self._segments.known),
            bytes=sum(segment.size for segment in self._segments.known.values()),
            duplicates=self._duplicates,
            lost_bytes=damage.lost_bytes,
            damaged_bytes=damage.damaged_bytes + damage.missing_bytes,
            mended_bytes=damage.mended_bytes,
        )

    async def process_id(self) -> int:
        """The process that this shard runs in."""
        return os.getpid()

    async def close(self) -> None:
        """Waits for what is being written and closes the segment; later appends are refused."""
        self._closed = True
        while self._flushing is not None and not self._flushing.done():
            await self._flushing
        self._segments.close()

    async def _flush(self) -> None:
        while self._pending:
            waiting, self._pending = self._pending, []
            batches = [batch for batch, _ in waiting]
            failure: Exception | None = None
            new = [0] * len(waiting)
            try:
                merged, counts = self._merge(batches)
                if merged.num_rows:
                    # The index is the loop's alone, so that a read never meets it half changed.
                    first = await asyncio.to_thread(self._segments.append, merged)
                    self._index.add(merged, first)
                    self._remember(merged)
                new = counts
                self._duplicates += sum(b.num_rows for b in batches) - merged.num_rows
            except OSError as error:
                reason = f"spans could not be written to {self._folder}: {error.strerror or error}"
                failure = InfrastructureError(reason)
            except Exception as error:
                # Whoever waits is told, and the next append finds a store that goes on.
                log.exception("spans could not be stored")
                failure = InfrastructureError(f"spans could not be stored: {error}")
            for (_, stored), count in zip(waiting, new, strict=True):
                if stored.cancelled():
                    continue
                if failure is None:
                    stored.set_result(count)
                else:
                    stored.set_exception(failure)
            if any(new):
                self._tell(batches)

    def _merge(self, batches: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, list[int]]:
        """One batch of the new spans with their sequence numbers, and how many each brought."""
        merged = batches[0] if len(batches) == 1 else pa.concat_batches(batches)
        lengths = [batch.num_rows for batch in batches]
        keep = self._new_rows(merged)
        if keep is not None:
            merged = merged.take(pa.array(np.flatnonzero(keep)))
            ends = np.cumsum(lengths)
            lengths = [int(keep[end - n : end].sum()) for end, n in zip(ends, lengths, strict=True)]
        numbers = pa.array(self._numbers(merged), pa.int64())
        return merged.set_column(_SEQUENCE, SPAN_SCHEMA.field(_SEQUENCE), numbers), lengths

    def _new_rows(self, batch: pa.RecordBatch) -> npt.NDArray[np.bool_] | None:
        """Which rows are not stored yet: bool[rows]; None for all of them."""
        attempts, span_ids = names_of(batch)
        suspects = self._index.suspects(attempts, span_ids)
        names = list(zip(attempts, span_ids, strict=True))
        if not suspects and len(set(names)) == len(names):
            return None
        # A key is 64 bits of a name: whether a span is there for sure is what lies on the disk.
        stored = {
            name for piece in self._rows(suspects) for name in zip(*names_of(piece), strict=True)
        }
        keep = np.zeros(len(names), bool)
        for row, name in enumerate(names):
            if name not in stored:
                stored.add(name)
                keep[row] = True
        return keep

    def _numbers(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """The sequence numbers of new spans: int64[rows]."""
        encoded = batch.column("attempt_id").dictionary_encode()
        codes = encoded.indices.to_numpy()
        last = np.fromiter(map(self._last_number, encoded.dictionary.to_pylist()), np.int64)
        if len(last) == 1:
            return last[0] + np.arange(1, len(codes) + 1)
        order = np.argsort(codes, kind="stable")
        counts = np.bincount(codes, minlength=len(last))
        ranks = np.empty(len(codes), np.int64)
        ranks[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
        return last[codes] + ranks + 1

    def _last_number(self, attempt: str) -> int:
        number = self._last.get(attempt)
        if number is not None:
            return number
        places = self._index.places(rollout_of(attempt))
        if not places:
            return 0
        spans = self._gather(places, "attempt_id", [attempt])
        return max(spans["sequence"].to_pylist(), default=0)

    def _remember(self, batch: pa.RecordBatch) -> None:
        numbers = zip(
            batch.column("attempt_id").to_pylist(),
            batch.column("sequence").to_pylist(),
            strict=True,
        )
        for attempt, number in dict(numbers).items():
            self._last[attempt] = number
            self._last.move_to_end(attempt)
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)

    def _tell(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Wakes whoever waits for news."""
        names = {n: None for b in batches for n in b.column("attempt_id").unique().to_pylist()}
        self._flushes += 1
        self._heard.append((self._flushes, list(names)))
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _places(self, rollouts: Iterable[str]) -> list[int]:
        return [p for rollout in dict.fromkeys(rollouts) for p in self._index.places(rollout)]

    def _rows(self, places: Iterable[int]) -> list[pa.RecordBatch]:
        """What lies at these places, by segment and in order, as slices of their pages."""
        return [
            piece
            for number, rows in split_places(places).items()
            for piece in self._segments.rows(number, rows)
        ]

    def _gather(self, places: Sequence[int], column: str, wanted: Sequence[str]) -> pa.Table:
        """The rows at these places whose `column` is wanted, in the order wanted."""
        table = pa.Table.from_batches(self._rows(places), SPAN_SCHEMA).combine_chunks()
        return in_order(table, column, wanted)

    def _scan(
        self, part: tuple[int, int], columns: Sequence[str] | None, where: pc.Expression | None
    ) -> pa.Table:
        number, first = part
        table = self._segments.table(number, first).slice(0, PART_ROWS)
        if where is not None:
            table = table.filter(where)
        return table if columns is None else table.select(list(columns))

    def _behind(self, after: int, limit: int) -> tuple[int, pa.Table]:
        for number in sorted(self._segments.known):
            first = after & 0xFFFFFFFF if number == after >> 32 else 0
            if number < after >> 32 or first >= self._segments.known[number].rows:
                continue
            table = self._segments.table(number, first).slice(0, limit)
            return number << 32 | first + table.num_rows, table
        return after, SPAN_SCHEMA.empty_table()


async def _within(news: asyncio.Event, deadline: float) -> bool:
    """Whether there was news before the deadline (the loop's clock)."""
    try:
        async with asyncio.timeout_at(deadline):
            await news.wait()
        return True
    except TimeoutError:
        return False


def in_order(table: pa.Table, column: str, wanted: Sequence[str]) -> pa.Table:
    """The rows whose `column` is wanted: in the order wanted, by attempt, then by `sequence`.

    A table that is so already is given as it is.
    """
    ranks = _codes(table[column], {name: rank for rank, name in enumerate(wanted)})
    attempts = ranks if column == "attempt_id" else _attempt_codes(table["attempt_id"])
    sequence = table["sequence"].to_numpy()
    if (ranks >= 0).all():
        same = np.diff(ranks) == 0
        step = np.diff(attempts)
        good = (np.diff(ranks) > 0) | same & ((step > 0) | (step == 0) & (np.diff(sequence) > 0))
        if good.all():
            return table
    order = np.lexsort((sequence, attempts, ranks))
    return table.take(pa.array(order[np.searchsorted(ranks[order], 0) :]))


def rollout_of(attempt_id: str) -> str:
    """The rollout that an attempt ("ROLLOUT/N") belongs to."""
    return attempt_id.rpartition("/")[0]


def _attempt_codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Numbers that order attempts of one rollout: N of "ROLLOUT/N"."""
    names = column.combine_chunks().dictionary_encode()
    numbers = {name: int(name.rpartition("/")[2] or 0) for name in names.dictionary.to_pylist()}
    return _codes(column, numbers)


def _codes(column: pa.ChunkedArray, code_of: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """For each row the code of its text, -1 where it has none: int64[rows]."""
    if len(column) == 0:
        return np.empty(0, np.int64)
    names = column.combine_chunks().dictionary_encode()
    codes = np.fromiter((code_of.get(n, -1) for n in names.dictionary.to_pylist()), np.int64)
    return codes[names.indices.to_numpy()]
