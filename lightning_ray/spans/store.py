"""One shard of the span store: an actor that owns its segments and answers reads from them.

Invariants: an append is answered after its spans are on disk; a span of an attempt is stored once,
so a writer may repeat an append whose answer it did not get; `sequence` numbers the spans of an
attempt 1, 2, 3, ... in the order in which they arrived. A restarted store reads its segments and
goes on.
"""

import asyncio
import ctypes
import itertools
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.config import SpansConfig
from lightning_ray.spans.index import SpanIndex, names_of
from lightning_ray.spans.layout import shard_folder
from lightning_ray.spans.memory import give_back
from lightning_ray.spans.reading import Part, ShardReader, rollout_of
from lightning_ray.spans.retention import check_not_removed
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.sealing import SealedSegments
from lightning_ray.spans.segments import Segments
from lightning_ray.spans.store_stats import Heard, StoreStats

log = logging.getLogger(__name__)

_SEQUENCE = SPAN_SCHEMA.get_field_index("sequence")
_REMEMBERED = 1 << 14
"""Attempts whose last sequence number is kept in memory; of others it is read from the disk."""
KEEP_EVERY_S = 5.0
"""How often it is looked whether there is something to seal, seconds."""
CLOSE_S = 5.0
"""Longest that closing waits for the segment that is being sealed, seconds: an archive may be
silent for longer."""
NAMES = ["attempt_id", "span_id"]
INDEXED = ["rollout_id", *NAMES]
_HEARD = 1 << 14
"""Attempts that are remembered for `activity`: those that got spans last."""


class SpanStore:
    """The state and files of one shard; run as a Ray actor (`spans.client.start_store`)."""

    def __init__(self, folder: str, config: SpansConfig, shard: int = 0):
        """Opens a shard in a folder of spans (made if it is missing) and indexes its segments.

        Raises InfrastructureError when something there cannot be read.
        """
        self._folder = shard_folder(Path(folder), shard)
        self._config = config
        self._segments = Segments(self._folder, config.segment_bytes)
        self._sealed = SealedSegments(Path(folder), shard, self._segments, config)
        self._reader = ShardReader(self._segments, self._sealed)
        self._index = SpanIndex()
        self._last: OrderedDict[str, int] = OrderedDict()
        self._duplicates = 0
        for first, batch in self._segments.recover():
            self._index.add(batch, first)
        for number in self._sealed.only():
            for batch in self._sealed.read(number, columns=INDEXED).to_batches():
                # Which row it is in the archive does not matter: there it is found by its names.
                self._index.add(batch, number << 32)
        self._pending: list[tuple[pa.RecordBatch, asyncio.Future[int]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False
        self._process = secrets.token_hex(4)
        self._flushes = 0
        self._heard: OrderedDict[str, int] = OrderedDict()
        self._news = asyncio.Event()
        self._tending = asyncio.Lock()
        """Held by whoever seals."""
        self._writing = asyncio.Lock()
        """Held while the open segment is written to, or closed."""
        self._keeping: asyncio.Task[None] | None = None
        self._begun: tuple[int | None, float] = (None, 0.0)

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
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())
        self._pending.append((batch, stored))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return await stored

    async def read(self, attempt_ids: Sequence[str]) -> pa.Table:
        """The spans of these attempts, in the order asked, each attempt's by `sequence`.

        Called through Ray, the table goes to the object store and the caller may pass its
        reference on without fetching it. Raises SpansRemoved for what was removed.
        """
        rollouts = [rollout_of(attempt) for attempt in attempt_ids]
        return await self._read(rollouts, "attempt_id", attempt_ids)

    async def rollouts(self, rollout_ids: Sequence[str]) -> pa.Table:
        """The spans of every attempt of these rollouts, in the order asked, by attempt."""
        return await self._read(rollout_ids, "rollout_id", rollout_ids)

    async def _read(self, rollouts: Sequence[str], column: str, wanted: Sequence[str]) -> pa.Table:
        if self._sealed.gone:
            await asyncio.to_thread(check_not_removed, self._folder.parent, rollouts)
        return await asyncio.to_thread(self._reader.gather, self._places(rollouts), column, wanted)

    async def parts(self) -> list[Part]:
        """What `scan` can be asked for: segments, each in pieces (number, first row)."""
        return self._reader.parts()

    async def scan(
        self, part: Part, columns: Sequence[str] | None, where: pc.Expression | None
    ) -> pa.Table:
        """One part's rows for which the expression holds, in order of arrival."""
        return await asyncio.to_thread(self._reader.scan, part, columns, where)

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
            after, table = await asyncio.to_thread(self._reader.behind, after, limit)
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
        latest = itertools.takewhile(lambda heard: heard[1] > start, reversed(self._heard.items()))
        return Heard(self._process, self._flushes), [attempt for attempt, _ in latest][::-1]

    async def stats(self) -> StoreStats:
        """What the store holds now."""
        damage = self._segments.damage
        return StoreStats(
            spans=self._index.spans,
            segments=len(self._segments.known),
            bytes=sum(segment.size for segment in list(self._segments.known.values())),
            duplicates=self._duplicates,
            lost_bytes=damage.lost_bytes,
            damaged_bytes=damage.damaged_bytes + damage.missing_bytes,
            mended_bytes=damage.mended_bytes,
            sealed=len(self._sealed.known),
            sealed_bytes=sum(sealed.bytes for sealed in list(self._sealed.known.values())),
            removed=self._sealed.removed,
        )

    async def process_id(self) -> int:
        """The process that this shard runs in."""
        return os.getpid()

    async def close(self) -> None:
        """Waits for what is being written and closes the segment; later appends are refused.

        The segment that is being sealed is waited for too, `CLOSE_S` at most; whatever is not
        sealed then is by whoever opens the store next.
        """
        self._closed = True
        while self._flushing is not None and not self._flushing.done():
            await self._flushing
        try:
            async with asyncio.timeout(CLOSE_S), self._tending:
                await self._stop_keeping()
        except TimeoutError:
            log.warning("%s closes while a segment is still being sealed", self._folder)
            await self._stop_keeping()
        self._segments.close()

    async def _stop_keeping(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def seal(self) -> int:
        """Closes the open segment and seals what is closed; how many segments were sealed.

        Raises InfrastructureError when the archive refuses; nothing is lost then.
        """
        async with self._tending:
            async with self._writing:
                await asyncio.to_thread(self._segments.close)
            try:
                return await asyncio.to_thread(self._tend)
            except OSError as error:
                raise InfrastructureError(f"spans could not be sealed: {error}") from error

    async def _keep(self) -> None:
        """Seals segments as they close, and closes those that are old."""
        while True:
            await asyncio.sleep(min(KEEP_EVERY_S, self._config.seal_after_s))
            try:
                async with self._tending:
                    await self._close_if_old(time.monotonic())
                    await asyncio.to_thread(self._tend)
                await asyncio.to_thread(give_back)
            except (OSError, InfrastructureError) as error:
                # Nothing is lost: the segments stay as they are until it is possible.
                log.warning("spans in %s could not be sealed: %s", self._folder, error)

    async def _close_if_old(self, now: float) -> None:
        number = self._segments.open_number
        if number != self._begun[0]:
            self._begun = number, now
        if number is not None and now - self._begun[1] >= self._config.seal_after_s:
            async with self._writing:
                await asyncio.to_thread(self._segments.close)

    async def remove_run(self, run_id: str) -> int:
        """Removes a run's spans, on record; how many. Raises InfrastructureError."""
        await self.seal()
        async with self._tending:
            try:
                return await asyncio.to_thread(self._sealed.retain, time.time_ns(), run_id)
            except OSError as error:
                raise InfrastructureError(f"spans could not be removed: {error}") from error

    def _tend(self) -> int:
        """Seals what is closed, gives up and removes the rest; how many segments were sealed.

        Once the store is closed it leaves what it has not begun.
        """
        sealed = 0
        for number in self._sealed.waiting():
            if self._closed:
                return sealed
            self._sealed.seal(number)
            sealed += 1
        self._sealed.give_up()
        self._sealed.retain(time.time_ns())
        if sealed:
            _trim_memory()
        return sealed

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
                    async with self._writing:
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
        stored: set[tuple[str, str]] = set()
        for piece in self._reader.find(suspects, "attempt_id", attempts, NAMES) if suspects else ():
            stored.update(zip(*names_of(piece), strict=True))
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
        spans = self._reader.gather(places, "attempt_id", [attempt])
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

    def _places(self, rollouts: Iterable[str]) -> list[int]:
        return [p for rollout in dict.fromkeys(rollouts) for p in self._index.places(rollout)]

    def _tell(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Wakes whoever waits for news."""
        self._flushes += 1
        for batch in batches:
            for attempt in batch.column("attempt_id").unique().to_pylist():
                self._heard[attempt] = self._flushes
                self._heard.move_to_end(attempt)
        while len(self._heard) > _HEARD:
            self._heard.popitem(last=False)
        news, self._news = self._news, asyncio.Event()
        news.set()


def _trim_memory() -> None:
    """Gives back what sealing and the index's merges have freed, where the C library can."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def _within(news: asyncio.Event, deadline: float) -> bool:
    """Whether there was news before the deadline (the loop's clock)."""
    try:
        async with asyncio.timeout_at(deadline):
            await news.wait()
        return True
    except TimeoutError:
        return False
