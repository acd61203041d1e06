"""A process's line to the queue: calls that come while others are under way share one message.

Invariant: each caller gets the answer to its own call, as if it had called the queue by itself. A
message costs the queue's actor about a millisecond whatever is in it, a worker has many slots, and
the door many callers.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts.asking import ask_async
from lightning_ray.rollouts.roster import RosterReader
from lightning_ray.rollouts.types import AttemptOutcome, Identity, Lease, RolloutSpec

Call = tuple[str, tuple[Any, ...]]
"""A method of the queue that `RolloutQueue.together` takes, and its arguments."""

MOST = 512
"""Calls of one message."""


class Line:
    """Calls of one event loop to one queue. Each raises InfrastructureError after its timeout."""

    def __init__(self, queue: ActorHandle, timeout_s: float = 60.0):
        """`timeout_s`: how long a queue that restarts is waited for, beside what a call waits."""
        self._queue = queue
        self._timeout_s = timeout_s
        self._waiting: list[tuple[Call, asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def enqueue(self, specs: Sequence[RolloutSpec]) -> int:
        """Queues rollouts in order; returns how many were new."""
        new: int = await self._call("enqueue", list(specs))
        return new

    async def dequeue(self, wait_s: float, worker: str, request: str) -> Lease | None:
        """The next attempt, for the caller alone; None when there was none for `wait_s` seconds.

        A `request` that is repeated gets the same lease again.
        """
        lease: Lease | None = await self._call("dequeue", 0.0, worker, request)
        if lease is None and wait_s > 0:
            # Whoever has to wait waits alone: a shared message would keep the others waiting.
            make = partial(self._queue.dequeue.remote, wait_s, worker, request)
            lease = await ask_async(make, wait_s + self._timeout_s, "hand out work", wait_s)
        return lease

    async def finish(self, attempt_id: str, outcome: AttemptOutcome) -> bool:
        """Reports an attempt; False when it no longer decides anything."""
        counted: bool = await self._call("finish", attempt_id, outcome)
        return counted

    def engines_of(self, policy: str) -> "asyncio.Future[tuple[str, ...]]":
        """Where a policy's engines are, if they have moved; see `RolloutQueue.engines_of`."""
        return self._call("engines_of", policy)

    def excuse(self, attempt_id: str, outcome: AttemptOutcome) -> "asyncio.Future[AttemptOutcome]":
        """What an attempt's outcome is made of, when faults of ours are known; see `Blame`."""
        return self._call("excuse", attempt_id, outcome)

    def blame(self, attempt_id: str, why: str, lost: bool) -> "asyncio.Future[None]":
        """An attempt met a fault of ours; `lost` says that an answer was cut off."""
        return self._call("blame", attempt_id, why, lost)

    async def roster(self) -> RosterReader | None:
        """The roster of running attempts, where it can be seen from this process."""
        place = await ask_async(self._queue.roster.remote, self._timeout_s, "say where it keeps it")
        if place is None or place[0] != ray.get_runtime_context().get_node_id():
            return None
        return RosterReader(Path(place[1]))

    async def door_opened(self) -> None:
        """A replica of the door begins; see `RolloutQueue.door_opened`."""
        await ask_async(self._queue.door_opened.remote, self._timeout_s, "hear of the door")

    def resolve(self, capability: str, telling: bool = False) -> "asyncio.Future[Identity | None]":
        """Whom a capability stands for at the time of asking; see `RolloutQueue.resolve`."""
        return self._call("resolve", capability, telling)

    def _call(self, method: str, *arguments: Any) -> "asyncio.Future[Any]":
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(((method, arguments), answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        return answer

    async def _send(self) -> None:
        # One turn of the loop: those who are ready now go along.
        await asyncio.sleep(0)
        while self._waiting:
            some, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            calls = [call for call, _ in some]
            make = partial(self._queue.together.remote, calls)
            answers: list[Any] = []
            try:
                answers = await ask_async(make, self._timeout_s, f"answer {len(calls)} calls")
            except (InfrastructureError, ray.exceptions.RayError) as error:
                answers = [error] * len(calls)
            finally:
                # Nobody may wait for an answer that never comes: this task may be cancelled too.
                if not answers:
                    for _, answer in some:
                        answer.cancel()
            for (_, answer), given in zip(some, answers, strict=True):
                if answer.done():
                    continue
                if isinstance(given, Exception):
                    answer.set_exception(given)
                else:
                    answer.set_result(given)
