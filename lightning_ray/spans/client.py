"""Starting the span store's shards as actors, and talking to them with timeouts.

A rollout's spans are in one shard. A client can be pickled and handed to other actors; it holds no
state of its own.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_ray.errors import InfrastructureError, own_error
from lightning_ray.spans.archive import check_archive
from lightning_ray.spans.config import SpansConfig
from lightning_ray.spans.layout import prepare_folder, shard_of
from lightning_ray.spans.memory import hold_little
from lightning_ray.spans.reading import in_order, rollout_of
from lightning_ray.spans.rows import to_batch
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.store import SpanStore
from lightning_ray.spans.store_stats import Heard, StoreStats

RETRY_EVERY_S = 0.2
_RESTARTS = (ray.exceptions.ActorUnavailableError, ray.exceptions.OutOfMemoryError)
"""What a call meets whose shard has just died; of memory Ray may take from whom it likes."""
SCAN_AHEAD = 4
"""Parts of a scan that are read before they are asked for."""
TAIL_ROWS = 10_000
"""Rows that one answer of a tail looks at."""

LISTEN_S = 10.0
"""How long a shard waits for news before it answers that there are none."""


@dataclass
class Listening:
    """Where a listener stands in each shard, and what it has asked them."""

    heard: list[Heard | None]
    asked: dict[int, "asyncio.Task[tuple[Heard, list[str]]]"] = field(default_factory=dict)

    def stop(self) -> None:
        """Gives up what was asked."""
        for task in self.asked.values():
            task.cancel()


class SpanClient:
    """A store as its callers see it."""

    def __init__(self, shards: Sequence[ActorHandle], config: SpansConfig):
        self.shards = tuple(shards)
        self._config = config

    async def append(self, spans: Sequence[Mapping[str, Any]] | pa.RecordBatch) -> int:
        """Stores rows made by `spans.span`, or a batch of SPAN_SCHEMA; returns how many were new.

        Returns once they are on disk. A shard that dies meanwhile restarts, and the append is
        repeated: span ids make that harmless. Raises InfrastructureError after
        `append_timeout_s`, or when the disk refuses; some shards may have stored their part then.
        """
        batch = spans if isinstance(spans, pa.RecordBatch) else to_batch(spans)
        parts = self._parts(batch)
        new = await asyncio.gather(
            *(self._append(self.shards[number], part) for number, part in parts.items())
        )
        return sum(new)

    def read(self, attempt_ids: Sequence[str]) -> "ray.ObjectRef[pa.Table]":
        """A reference to the table of these attempts' spans, by attempt as asked and `sequence`.

        Pass it on, or `get` it: its buffers are the object store's. Fetching it raises SpansRemoved
        when some of it was removed, as every way of reading rollouts does.
        """
        return self._asked("read", "attempt_id", attempt_ids, rollout_of)

    def read_rollouts(self, rollout_ids: Sequence[str]) -> "ray.ObjectRef[pa.Table]":
        """As `read`, for every attempt of these rollouts."""
        return self._asked("rollouts", "rollout_id", rollout_ids, str)

    def get(self, attempt_ids: Sequence[str]) -> pa.Table:
        """The table itself, its buffers shared with the object store."""
        table: pa.Table = self._get(lambda: self.read(attempt_ids), "gave no table")
        return table

    def rollouts(self, rollout_ids: Sequence[str]) -> pa.Table:
        """As `get`, for every attempt of these rollouts."""
        table: pa.Table = self._get(lambda: self.read_rollouts(rollout_ids), "gave no table")
        return table

    def rollout(self, rollout_id: str) -> pa.Table:
        """Every span of one rollout."""
        return self.rollouts([rollout_id])

    async def fetch(self, attempt_ids: Sequence[str]) -> pa.Table:
        """As `get`, for a caller that runs an event loop."""
        table: pa.Table = await self._await(lambda: self.read(attempt_ids), "gave no table")
        return table

    def scan(
        self, where: "pc.Expression | None" = None, columns: Sequence[str] | None = None
    ) -> "Iterator[ray.ObjectRef[pa.Table]]":
        """Every span for which the expression holds, as references to tables of `columns`.

        Each table has at most `reading.PART_ROWS` rows of one shard, in order of arrival. A few are
        asked for ahead; nothing passes through the caller unless it fetches a reference. Spans
        that arrive meanwhile may be left out. Raises InfrastructureError.
        """
        parts: list[list[tuple[int, int]]] = self._get(
            lambda: [shard.parts.remote() for shard in self.shards], "did not say what it holds"
        )
        named = None if columns is None else list(columns)
        ahead: deque[ray.ObjectRef[pa.Table]] = deque()
        for shard, found in zip(self.shards, parts, strict=True):
            for part in found:
                ahead.append(shard.scan.remote(part, named, where))
                if len(ahead) > SCAN_AHEAD:
                    yield ahead.popleft()
        yield from ahead

    async def tail(
        self, run_id: str | None = None, wait_s: float = 10.0
    ) -> AsyncIterator[pa.Table]:
        """Tables of spans as they arrive, from the first on; it ends when the caller stops.

        The spans of one rollout come in order of arrival; across a restart of a shard none is
        missed. A shard answers as soon as it has something, or after `wait_s` seconds.
        """
        after = [0] * len(self.shards)
        waiting: dict[asyncio.Task[tuple[int, pa.Table]], int] = {}

        def ask(number: int) -> None:
            shard, place = self.shards[number], after[number]
            asking = self._await(
                lambda: shard.tail.remote(place, TAIL_ROWS, wait_s, run_id), "gave no news", wait_s
            )
            waiting[asyncio.ensure_future(asking)] = number

        try:
            for number in range(len(self.shards)):
                ask(number)
            while True:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = waiting.pop(task)
                    after[number], table = task.result()
                    ask(number)
                    if table.num_rows:
                        yield table
        finally:
            for task in waiting:
                task.cancel()

    async def activity(
        self, since: "Listening | None", timeout_s: float
    ) -> "tuple[Listening, list[str]]":
        """The attempts that got spans since then, waiting up to `timeout_s` for the first one.

        `since` is what the last call gave, None at first; it belongs to one event loop. After a
        restart of a shard an attempt may be named again; none is left out.
        """
        listening = since or Listening([None] * len(self.shards))
        for number, shard in enumerate(self.shards):
            # What a shard has been asked and has not answered is not asked again.
            if number not in listening.asked:
                asking = self._activity_of(shard, listening.heard[number], LISTEN_S)
                listening.asked[number] = asyncio.ensure_future(asking)
        await asyncio.wait(
            listening.asked.values(), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        names: list[str] = []
        for number, task in list(listening.asked.items()):
            if task.done():
                del listening.asked[number]
                listening.heard[number], found = task.result()
                names += found
        return listening, names

    def stats(self) -> StoreStats:
        """What the store holds, over all shards."""
        found: list[StoreStats] = self._get(
            lambda: [shard.stats.remote() for shard in self.shards], "did not say what it holds"
        )
        return sum(found[1:], found[0])

    def remove_run(self, run_id: str) -> int:
        """Removes every span of a run, on record; returns how many."""
        removed: list[int] = self._get(
            lambda: [shard.remove_run.remote(run_id) for shard in self.shards], "did not remove"
        )
        return sum(removed)

    def close(self, timeout_s: float = 10.0) -> None:
        """Closes the shards' segments and ends the actors."""
        try:
            closing = [shard.close.remote() for shard in self.shards]
            ray.get(closing, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"the span store did not close in {timeout_s:g} s") from error
        finally:
            for shard in self.shards:
                ray.kill(shard)

    def _parts(self, batch: pa.RecordBatch) -> dict[int, pa.RecordBatch]:
        """The batch by shard."""
        if len(self.shards) == 1 or batch.num_rows == 0:
            return {0: batch}
        rollouts = batch.column("rollout_id").dictionary_encode()
        shards = np.array([shard_of(r, len(self.shards)) for r in rollouts.dictionary.to_pylist()])
        if len(set(shards.tolist())) == 1:
            return {int(shards[0]): batch}
        numbers = shards[rollouts.indices.to_numpy()]
        return {
            int(number): batch.take(pa.array(np.flatnonzero(numbers == number)))
            for number in np.unique(numbers)
        }

    async def _append(self, shard: ActorHandle, batch: pa.RecordBatch) -> int:
        limit = self._config.append_timeout_s
        new: int = await self._await(lambda: shard.append.remote(batch), "took no spans", 0, limit)
        return new

    async def _activity_of(
        self, shard: ActorHandle, since: Heard | None, timeout_s: float
    ) -> tuple[Heard, list[str]]:
        answer: tuple[Heard, list[str]] = await self._await(
            lambda: shard.activity.remote(since, timeout_s), "gave no news", timeout_s
        )
        return answer

    def _asked(
        self,
        method: str,
        column: str,
        wanted: Sequence[str],
        rollout: Callable[[str], str],
    ) -> "ray.ObjectRef[pa.Table]":
        """One table of what the shards have of `wanted`."""
        by_shard: dict[int, list[str]] = {}
        for name in dict.fromkeys(wanted):
            by_shard.setdefault(shard_of(rollout(name), len(self.shards)), []).append(name)
        found = [
            getattr(self.shards[number], method).remote(names) for number, names in by_shard.items()
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            return ray.put(SPAN_SCHEMA.empty_table())
        return _join.remote(column, list(wanted), *found)

    async def _await(
        self, call: Callable[[], Any], missing: str, more_s: float = 0, limit_s: float | None = None
    ) -> Any:
        """The answer to a call that may be repeated, which it is while its shard restarts."""
        limit = more_s + (self._config.read_timeout_s if limit_s is None else limit_s)
        try:
            async with asyncio.timeout(limit):
                while True:
                    try:
                        return await call()
                    except _RESTARTS:
                        await asyncio.sleep(RETRY_EVERY_S)
        except TimeoutError as error:
            raise InfrastructureError(f"the span store {missing} for {limit:g} s") from error
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError(f"the span store died: {error}") from error
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None

    def _get(self, call: Callable[[], Any], missing: str) -> Any:
        """As `_await`, for a caller without an event loop."""
        limit = self._config.read_timeout_s
        deadline = time.monotonic() + limit
        while True:
            try:
                return ray.get(call(), timeout=max(0.0, deadline - time.monotonic()))
            except _RESTARTS:
                time.sleep(RETRY_EVERY_S)
            except ray.exceptions.GetTimeoutError as error:
                raise InfrastructureError(f"the span store {missing} for {limit:g} s") from error
            except ray.exceptions.RayActorError as error:
                raise InfrastructureError(f"the span store died: {error}") from error
            except ray.exceptions.RayTaskError as error:
                raise own_error(error) from None


class _Shard(SpanStore):
    """A shard in a process of its own."""

    def __init__(self, folder: str, config: SpansConfig, shard: int):
        hold_little()
        super().__init__(folder, config, shard)


@ray.remote(num_cpus=0)
def _join(column: str, wanted: list[str], *tables: pa.Table) -> pa.Table:
    """The shards' answers as one table."""
    return in_order(pa.concat_tables(tables).combine_chunks(), column, wanted)


def start_store(folder: str, config: SpansConfig) -> SpanClient:
    """Starts the store of one run on `folder`; a shard restarts by itself when its process dies.

    Raises InfrastructureError when the folder cannot be used, UserError when the archive cannot.
    """
    # Where the job was started: of other nodes any may come and go. Not softly: for an actor that
    # needs no processor Ray takes that for leave to place it anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_Shard).options(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=1000,
        scheduling_strategy=here,
    )
    shards = prepare_folder(Path(folder), config.shards)
    if config.archive:
        # Said now and not at the first seal, hours later.
        check_archive(config.archive, Path(folder))
    return SpanClient([actor.remote(folder, config, n) for n in range(shards)], config)
