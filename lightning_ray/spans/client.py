"""Starting the span store as an actor, and talking to it with timeouts."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.config import SpansConfig
from lightning_ray.spans.rows import to_batch
from lightning_ray.spans.store import SpanStore, StoreStats


class SpanClient:
    """A store as its callers see it. Can be pickled and handed to other actors."""

    def __init__(self, store: ActorHandle, config: SpansConfig):
        self._store = store
        self._config = config

    async def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores rows made by `spans.span`; returns once they are on disk.

        A store that dies meanwhile restarts, and the append is repeated: span ids make that
        harmless. Raises InfrastructureError after `append_timeout_s`, or when the disk refuses.
        """
        batch = to_batch(rows)
        limit = self._config.append_timeout_s
        try:
            async with asyncio.timeout(limit):
                while True:
                    try:
                        await self._store.append.remote(batch)
                        return
                    except ray.exceptions.ActorUnavailableError:
                        await asyncio.sleep(0.2)
        except TimeoutError as error:
            raise InfrastructureError(f"the span store took no spans for {limit:g} s") from error
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError(f"the span store died: {error}") from error

    def read(self, attempt_ids: Sequence[str]) -> "ray.ObjectRef[pa.Table]":
        """A reference to the table of these attempts' spans; pass it on, or `get` it."""
        return self._store.read.remote(list(attempt_ids))

    def get(self, attempt_ids: Sequence[str]) -> pa.Table:
        """The table itself, its buffers shared with the object store."""
        limit = self._config.read_timeout_s
        try:
            return ray.get(self.read(attempt_ids), timeout=limit)
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"the span store gave no table for {limit:g} s") from error
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError(f"the span store died: {error}") from error

    async def fetch(self, attempt_ids: Sequence[str]) -> pa.Table:
        """As `get`, for a caller that runs an event loop."""
        limit = self._config.read_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self.read(attempt_ids)
        except TimeoutError as error:
            raise InfrastructureError(f"the span store gave no table for {limit:g} s") from error
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError(f"the span store died: {error}") from error

    def stats(self) -> StoreStats:
        """What the store holds."""
        return ray.get(self._store.stats.remote(), timeout=self._config.read_timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Closes the store's segment and ends the actor."""
        ray.get(self._store.close.remote(), timeout=timeout_s)
        ray.kill(self._store)


def start_store(folder: str, config: SpansConfig) -> SpanClient:
    """Starts the store of one run on `folder`; it restarts by itself when its process dies."""
    actor = ray.remote(SpanStore).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000
    )
    return SpanClient(actor.remote(folder, config), config)
