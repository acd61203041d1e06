"""Our side of the claims that are held against a peer; each function is one measurement.

What a measurement needs is made before its clock starts, on both sides: the peer's `Span` objects,
our rows, record batches and OTLP messages. Turning these into bytes is inside the clock on both.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pyarrow as pa

from benchmarks import otlp, under_test, workload
from benchmarks.clients import require, together
from benchmarks.under_test import Door, Place
from benchmarks.workload import Call

_ARROW_STREAM = "application/vnd.apache.arrow.stream"


def append_rows(folder: Path, first: int, spans: int, batch: int, clients: int) -> float:
    """Spans per second into one shard in this process, on disk, from rows."""
    made = under_test.rows(workload.calls(first, spans))
    return _append(folder, list(workload.batches(made, batch)), spans, clients)


def append_arrow(folder: Path, first: int, spans: int, batch: int, clients: int) -> float:
    """As `append_rows`, from record batches."""
    made = under_test.rows(workload.calls(first, spans))
    pieces = [under_test.batch_of(piece) for piece in workload.batches(made, batch)]
    return _append(folder, pieces, spans, clients)


def _append(folder: Path, pieces: list[Any], spans: int, clients: int) -> float:
    async def measure() -> float:
        store = under_test.open_store(folder)

        async def add(piece: Any) -> None:
            rows_or_batch = piece
            if not isinstance(piece, pa.RecordBatch):
                rows_or_batch = under_test.batch_of(piece)
            await store.append(rows_or_batch)

        seconds = await together(add, pieces, clients)
        require((await store.stats()).spans, spans, "spans stored")
        await store.close()
        return seconds

    return spans / asyncio.run(measure())


@dataclass(frozen=True)
class _Post:
    """A request whose body is made when it is sent."""

    address: str
    headers: dict[str, str]
    body: Callable[[], bytes]


def http_ingest(door: Door, first: int, spans: int, batch: int, clients: int, form: str) -> float:
    """Spans per second through the door into the store, on disk.

    Args:
        form: What is sent. "recorded": model calls with their tokens in columns, by a caller with a
            key. "otlp" or "arrow": what an attempt tells of its calls, a batch to an attempt.
    """
    pieces = list(workload.batches(workload.calls(first, spans), batch))
    before = door.store.stats().spans
    posts = _recorded(door, pieces) if form == "recorded" else _told(door, pieces, form)

    async def measure() -> float:
        async with aiohttp.ClientSession() as session:

            async def send(one: _Post) -> None:
                posting = session.post(one.address, data=one.body(), headers=one.headers)
                async with posting as reply:
                    text = await reply.text()
                    if reply.status != 200 or "partialSuccess" in text:
                        raise RuntimeError(f"{form}: status {reply.status}: {text[:300]}")

            return await together(send, posts, clients)

    seconds = asyncio.run(measure())
    require(door.store.stats().spans - before, spans, "spans stored")
    return spans / seconds


def _recorded(door: Door, pieces: list[list[Call]]) -> list[_Post]:
    headers = {"content-type": _ARROW_STREAM, "authorization": f"Bearer {door.key}"}
    made = [under_test.batch_of(under_test.rows(piece)) for piece in pieces]
    return [_Post(door.url + under_test.BULK, headers, _Arrow(batch)) for batch in made]


def _told(door: Door, pieces: list[list[Call]], form: str) -> list[_Post]:
    posts = []
    for calls, lease in zip(pieces, under_test.leases(door.queue, len(pieces)), strict=True):
        base = f"{door.url}/a/{lease.capability}"
        if form == "otlp":
            export = otlp.export_request(calls, {"service.name": "agent"})
            headers = {"content-type": "application/x-protobuf"}
            posts.append(_Post(base + under_test.TRACES, headers, export.SerializeToString))
        else:
            at = Place(lease.rollout_id, lease.attempt_id)
            made = under_test.batch_of([under_test.telemetry_row(one, at) for one in calls])
            posts.append(
                _Post(base + under_test.BULK, {"content-type": _ARROW_STREAM}, _Arrow(made))
            )
    return posts


class _Arrow:
    """A record batch that becomes a body when called."""

    def __init__(self, batch: pa.RecordBatch):
        self._batch = batch

    def __call__(self) -> bytes:
        return under_test.arrow_body(self._batch)


def read(folder: Path, rollouts: int) -> tuple[float, int]:
    """Rollouts per second of one read for training; and the bytes that it made Arrow allocate.

    The store holds these rollouts and no others, as the peer's does. Timed until the table is here
    and every token of it was looked at.
    """
    spans = rollouts * workload.SPANS_PER_ROLLOUT
    places = [under_test.place(number) for number in range(rollouts)]
    with under_test.running_store(folder) as store:
        _fill(store, spans)
        # The first call of a process to an actor also introduces them to each other.
        store.get([places[0].attempt_id])
        wanted = [one.attempt_id for one in places]
        before = pa.total_allocated_bytes()
        begin = time.perf_counter()
        table = store.get(wanted)
        tokens = sum(_tokens(chunk) for chunk in table["token_ids"].chunks)
        seconds = time.perf_counter() - begin
        allocated = pa.total_allocated_bytes() - before
        require(table.num_rows, spans, "spans read")
        each = workload.PROMPT_TOKENS + workload.SAMPLED_TOKENS
        require(tokens, spans * each, "tokens read")
        del table
    return rollouts / seconds, allocated


def _fill(store: Any, spans: int) -> None:
    async def fill() -> None:
        for piece in workload.batches(workload.calls(0, spans), workload.SPANS_PER_BATCH):
            await store.append(under_test.batch_of(under_test.rows(piece)))

    asyncio.run(fill())


def _tokens(chunk: pa.ListArray) -> int:
    """How many tokens there are, each looked at, where they lie."""
    flat = chunk.flatten().to_numpy(zero_copy_only=True)
    return int(np.count_nonzero(flat >= 0))


def lifecycle(folder: Path, rollouts: int, clients: int) -> float:
    """Rollouts per second that are queued, taken by a worker and reported, over the network."""
    queue = under_test.start_lives(folder)
    try:

        async def measure() -> float:
            line = under_test.Line(queue.actor)

            async def live(number: int) -> None:
                await under_test.live_once(line, f"rollout-{number}", f"worker-{number % clients}")

            await live(-1)
            return await together(live, list(range(rollouts)), clients)

        seconds = asyncio.run(measure())
        require(under_test.succeeded(queue), rollouts + 1, "rollouts succeeded")
    finally:
        under_test.stop_lives(queue)
    return rollouts / seconds
