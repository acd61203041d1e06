"""The queue of rollouts: the actor that owns a run's lifecycle and wakes whoever waits for it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts.config import RolloutsConfig
from lightning_ray.rollouts.lifecycle import Counts, Lifecycle
from lightning_ray.rollouts.types import (
    AttemptOutcome,
    Identity,
    Lease,
    RolloutRecord,
    RolloutSpec,
)

log = logging.getLogger(__name__)

EXPIRE_EVERY_S = 1.0


class RolloutQueue:
    """The actor's class. Its methods are safe to repeat; waiting costs no polling."""

    def __init__(self, run_id: str, config: RolloutsConfig):
        self._lives = Lifecycle(run_id, config.grace_s, config.linger_s)
        self._work = asyncio.Event()
        self._ended: dict[str, asyncio.Event] = {}
        self._over: dict[str, asyncio.Event] = {}
        self._expiring: asyncio.Task[None] | None = None
        self._retired: set[str] = set()

    async def enqueue(self, specs: Sequence[RolloutSpec]) -> int:
        """Queues rollouts in order; returns how many were new."""
        if self._expiring is None:
            self._expiring = asyncio.create_task(self._expire())
        new = self._lives.enqueue(specs)
        self._work.set()
        return new

    async def dequeue(self, wait_s: float, worker: str = "") -> Lease | None:
        """The next attempt, for the caller alone; None when there was none for `wait_s` seconds.

        Nor is there any for a worker that has retired.
        """
        deadline = time.monotonic() + wait_s
        while worker not in self._retired:
            lease = self._lives.dequeue(time.monotonic())
            if lease is not None:
                self._over[lease.attempt_id] = asyncio.Event()
                return lease
            self._work.clear()
            try:
                await asyncio.wait_for(self._work.wait(), deadline - time.monotonic())
            except TimeoutError:
                return None
        return None

    async def retire(self, worker: str) -> None:
        """Gives a worker that stops nothing more: its calls that still wait here end empty.

        Ray does not end a call whose caller is gone; an attempt handed to one would be lost until
        it is overdue.
        """
        self._retired.add(worker)
        self._work.set()

    async def finish(self, attempt_id: str, outcome: AttemptOutcome) -> bool:
        """Takes a worker's report; False when the attempt no longer decides anything."""
        counted = self._lives.finish(attempt_id, outcome)
        self._release([attempt_id])
        if counted:
            self._after_end([attempt_id])
        return counted

    async def wait(self, rollout_ids: Sequence[str], timeout_s: float) -> list[RolloutRecord]:
        """The records of those that have ended within `timeout_s` seconds, in the order asked."""
        pending = [self._end_event(r).wait() for r in rollout_ids if not self._lives.ended(r)]
        try:
            await asyncio.wait_for(asyncio.gather(*pending), timeout_s)
        except TimeoutError:
            # Not an error: the caller sees from the records which are missing, and asks again.
            log.debug("rollouts still unfinished after %g s", timeout_s)
        return [self._lives.record(r) for r in rollout_ids if self._lives.ended(r)]

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        """Cancels rollouts; their workers stop the agents."""
        self._release(self._lives.cancel(rollout_ids))
        self._notify(rollout_ids)

    async def cancelled(self, attempt_id: str) -> None:
        """Returns when the attempt is over: cancelled, overdue or reported.

        Its worker waits here beside the agent. Nothing may wait on after the attempt, for Ray does
        not end a call whose caller lost interest, and an actor has only so many.
        """
        if (event := self._over.get(attempt_id)) is not None:
            await event.wait()

    async def resolve(self, capability: str, telling: bool = False) -> Identity | None:
        """Whom a capability stands for while its attempt lives; `telling`, a while longer."""
        return self._lives.resolve(capability, telling)

    async def counts(self) -> Counts:
        """How many rollouts stand where."""
        return self._lives.counts()

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        """Drops ended rollouts from memory."""
        self._lives.forget(rollout_ids)
        for rollout_id in rollout_ids:
            self._ended.pop(rollout_id, None)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            overdue = self._lives.expire(time.monotonic())
            for attempt_id in overdue:
                log.warning("attempt %s is unresponsive", attempt_id)
            self._release(overdue)
            self._after_end(overdue)

    def _release(self, attempt_ids: Sequence[str]) -> None:
        for attempt_id in attempt_ids:
            if (event := self._over.pop(attempt_id, None)) is not None:
                event.set()

    def _after_end(self, attempt_ids: Sequence[str]) -> None:
        if attempt_ids:
            # Some are queued again.
            self._work.set()
            self._notify([attempt_id.rpartition("/")[0] for attempt_id in attempt_ids])

    def _notify(self, rollout_ids: Sequence[str]) -> None:
        for rollout_id in rollout_ids:
            if self._lives.ended(rollout_id) and rollout_id in self._ended:
                self._ended.pop(rollout_id).set()

    def _end_event(self, rollout_id: str) -> asyncio.Event:
        return self._ended.setdefault(rollout_id, asyncio.Event())


class QueueClient:
    """The queue as the trainer sees it: with timeouts, and without Ray's exceptions."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor

    def enqueue(self, specs: Sequence[RolloutSpec], timeout_s: float = 30.0) -> int:
        """Queues rollouts in order; returns how many were new."""
        return _get(self.actor.enqueue.remote(list(specs)), timeout_s, "queue rollouts")

    def wait(self, rollout_ids: Sequence[str], timeout_s: float) -> list[RolloutRecord]:
        """The records of the rollouts that ended within `timeout_s` seconds."""
        waiting = self.actor.wait.remote(list(rollout_ids), timeout_s)
        return _get(waiting, timeout_s + 30, "wait for rollouts")

    def cancel(self, rollout_ids: Sequence[str], timeout_s: float = 30.0) -> None:
        """Cancels rollouts that have not ended."""
        _get(self.actor.cancel.remote(list(rollout_ids)), timeout_s, "cancel rollouts")

    def counts(self, timeout_s: float = 30.0) -> Counts:
        """How many rollouts stand where."""
        return _get(self.actor.counts.remote(), timeout_s, "count rollouts")

    def forget(self, rollout_ids: Sequence[str]) -> None:
        """Drops ended rollouts from the queue's memory, without waiting for it."""
        self.actor.forget.remote(list(rollout_ids))


def start_queue(run_id: str, config: RolloutsConfig) -> QueueClient:
    """Starts the queue of one run."""
    actor = ray.remote(RolloutQueue).options(num_cpus=0, max_concurrency=10_000)
    return QueueClient(actor.remote(run_id, config))


def _get(reference: "ray.ObjectRef", timeout_s: float, what: str) -> Any:
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise InfrastructureError(
            f"the rollout queue did not {what} within {timeout_s:g} s"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise InfrastructureError(f"the rollout queue died: {error}") from error
