"""What the store promises of itself, without a peer: growth, memory, bytes on disk, shards."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import under_test, workload
from benchmarks.clients import require, together

CONCURRENT_ROLLOUTS = 250
"""Rollouts side by side: a rollout's spans lie that far apart. 2,000 spans make a whole wave."""
TOKENS = workload.PROMPT_TOKENS + workload.SAMPLED_TOKENS


class Stream:
    """Record batches without an end, made fast: real rows once, then new ids and tokens.

    A batch holds one turn of `size` rollouts that run side by side; after SPANS_PER_ROLLOUT batches
    the next rollouts begin.
    """

    def __init__(self, size: int = CONCURRENT_ROLLOUTS):
        self._size = size
        rows = under_test.rows(workload.calls(0, size))
        self._model = under_test.batch_of(rows)
        self._rng = np.random.default_rng(0)

    def batches(self, spans: int) -> Iterator[pa.RecordBatch]:
        """`spans` spans, a multiple of SPANS_PER_ROLLOUT batches."""
        size = self._size
        for start in range(0, spans, size):
            wave, turn = divmod(start // size, workload.SPANS_PER_ROLLOUT)
            places = [under_test.place(wave * size + number) for number in range(size)]
            tokens = self._rng.integers(0, workload.VOCABULARY, size * TOKENS, np.int32)
            logprobs = -self._rng.exponential(0.5, size * workload.SAMPLED_TOKENS)
            yield under_test.with_columns(
                self._model,
                {
                    "span_id": pa.array([f"{start + number:016x}" for number in range(size)]),
                    "trace_id": pa.array(
                        [f"{wave * size + number:032x}" for number in range(size)]
                    ),
                    "rollout_id": pa.array([one.rollout_id for one in places]),
                    "attempt_id": pa.array([one.attempt_id for one in places]),
                    "start_ns": self._times(start, turn),
                    "end_ns": self._times(start, turn + 1),
                    "token_ids": _lists(tokens, TOKENS),
                    "logprobs": _lists(logprobs.astype(np.float32), workload.SAMPLED_TOKENS),
                },
            )

    def _times(self, start: int, turn: int) -> pa.Array:
        begin = workload.BEGIN_NS + start * 1_000_000 + turn * 350_000_000
        return pa.array(np.arange(self._size, dtype=np.int64) * 1_000 + begin)


def _lists(values: np.ndarray, each: int) -> pa.ListArray:
    offsets = np.arange(0, len(values) + 1, each, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


@dataclass(frozen=True)
class Grown:
    """A store that was filled, and what was measured while it ran."""

    memory: dict[str, float]
    """Of the shard's process, MB (10^6 bytes); see `process_memory`."""
    empty: dict[str, float]
    """The same before the first span."""
    through_client_ms: float
    """Median time of a lookup through the client."""


def process_memory(process: psutil.Process) -> dict[str, float]:
    """Resident memory of a process, MB, as the kernel accounts for it (/proc/PID/status).

    `object_store` is shared memory (RssShmem): the object store's pages that the process has
    mapped. `file` is file-backed (RssFile): libraries, and segments that are memory-mapped, which
    the kernel drops when it wants the memory. `own` is the rest (RssAnon).
    `beyond_object_store` is `own` + `file`.
    """
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024 / 1e6
    return {
        "beyond_object_store": found["RssAnon"] + found["RssFile"],
        "own": found["RssAnon"],
        "file": found["RssFile"],
        "object_store": found["RssShmem"],
    }


def grow(folder: Path, spans: int, lookups: int, clients: int) -> Grown:
    """Fills a store of one shard with `spans` spans, through its actor."""
    with under_test.running_store(folder) as store:
        (process,) = under_test.shard_processes(store)
        empty = process_memory(process)
        fill(store, spans, clients)
        require(store.stats().spans, spans, "spans stored")
        rng = np.random.default_rng(1)
        took = []
        for number in rng.integers(0, spans // workload.SPANS_PER_ROLLOUT, lookups):
            at = under_test.place(int(number)).rollout_id
            begin = time.perf_counter()
            table = store.rollout(at)
            took.append(time.perf_counter() - begin)
            require(table.num_rows, workload.SPANS_PER_ROLLOUT, f"spans of {at}")
        return Grown(process_memory(process), empty, statistics.median(took) * 1000)


def fill(store: Any, spans: int, clients: int, size: int = CONCURRENT_ROLLOUTS) -> float:
    """Appends batches of `size` through the client, several at a time; returns spans per second."""

    async def send(batch: pa.RecordBatch) -> None:
        await store.append(batch)

    async def measure() -> float:
        seconds = 0.0
        stream = Stream(size).batches(spans)
        # A part at a time, so that they need not all be held; made outside the clock.
        while part := list(itertools.islice(stream, 32)):
            seconds += await together(send, part, clients)
        return seconds

    return spans / asyncio.run(measure())


def lookup_ms(folder: Path, spans: int, lookups: int) -> float:
    """Median time to look a rollout up in a store that was filled, in the store's own process.

    Without the way through Ray, which is the same however large the store is and would hide how
    the lookup itself grows.
    """

    async def measure() -> float:
        store = under_test.open_store(folder)
        rng = np.random.default_rng(2)
        took = []
        for number in rng.integers(0, spans // workload.SPANS_PER_ROLLOUT, lookups + 20):
            begin = time.perf_counter()
            table = await store.rollouts([under_test.place(int(number)).rollout_id])
            took.append(time.perf_counter() - begin)
            require(table.num_rows, workload.SPANS_PER_ROLLOUT, "spans looked up")
        await store.close()
        # The first ones also start threads and map files.
        return statistics.median(took[20:]) * 1000

    return asyncio.run(measure())


def bytes_per_turn(folder: Path, turns: int, calls: int) -> float:
    """Bytes on disk for one turn of rollouts of `turns` turns, `calls` calls in all.

    The calls go through the recorder of the engine, each with its whole history as the prompt, 64
    rollouts side by side; every turn adds as many tokens. All files of the store count.
    """
    side_by_side = 64

    async def measure() -> None:
        store = under_test.open_store(folder)
        recorder = under_test.Recorder(store)
        for wave in range(calls // (side_by_side * turns)):
            rng = np.random.default_rng(wave)
            history: list[list[int]] = [[] for _ in range(side_by_side)]
            for _ in range(turns):
                answers = []
                for number in range(side_by_side):
                    drawn = rng.integers(0, workload.VOCABULARY, TOKENS).tolist()
                    history[number] += drawn[: workload.PROMPT_TOKENS]
                    sampled = drawn[workload.PROMPT_TOKENS :]
                    at = under_test.place(wave * side_by_side + number)
                    answers.append(recorder.record(at, list(history[number]), sampled))
                    history[number] = history[number] + sampled
                await asyncio.gather(*answers)
        require((await store.stats()).spans, calls, "spans stored")
        await store.close()

    asyncio.run(measure())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return size / calls


def shards(folder: Path, count: int, spans: int, clients: int) -> float:
    """Spans per second that `count` shards take, through the client.

    In batches large enough that a shard's part of one is still a batch: 2,000 spans, each of
    another rollout.
    """
    with under_test.running_store(folder, shards=count) as store:
        store.get(["nobody/1"])
        rate = fill(store, spans, clients, size=2_000)
        require(store.stats().spans, spans, "spans stored")
        return rate
