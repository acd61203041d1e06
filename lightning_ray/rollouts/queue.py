"""The queue of rollouts: the actor that owns a run's lifecycle and wakes whoever waits for it.

Invariant: with a journal, no answer leaves before what it tells is on disk; a queue that dies
restarts as it was.
"""

import asyncio
import logging
import os
import pickle
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts.asking import RestartingError
from lightning_ray.rollouts.blame import Blame
from lightning_ray.rollouts.clock import Clock
from lightning_ray.rollouts.config import RolloutsConfig
from lightning_ray.rollouts.journal import Journal
from lightning_ray.rollouts.lifecycle import Lifecycle
from lightning_ray.rollouts.line import Call
from lightning_ray.rollouts.lives import Counts
from lightning_ray.rollouts.requests import Requests
from lightning_ray.rollouts.roster import make_roster
from lightning_ray.rollouts.types import (
    AttemptOutcome,
    Identity,
    Lease,
    RolloutRecord,
    RolloutSpec,
    WorkerRecord,
)
from lightning_ray.rollouts.waiters import Waiters
from lightning_ray.spans import SpanClient

log = logging.getLogger(__name__)

EXPIRE_EVERY_S = 1.0
_TOGETHER = frozenset({"enqueue", "dequeue", "finish", "resolve", "blame", "excuse", "engines_of"})
ROSTER = "running"
"""The roster's file, in the queue's folder."""
LISTEN_EVERY_S = 0.3
"""How often spans are taken as heartbeats, at most."""


class RolloutQueue:
    """The actor's class. Its methods are safe to repeat; waiting costs no polling."""

    def __init__(
        self,
        run_id: str,
        config: RolloutsConfig,
        folder: str | None = None,
        spans: SpanClient | bytes | None = None,
    ):
        """Goes on with what the journal in `folder` holds; None keeps everything in memory.

        `spans` are its heartbeats; as bytes, pickled by the process that made this actor.

        Raises InfrastructureError for a journal that cannot be read.
        """
        self._config = config
        self._spans: SpanClient | None = pickle.loads(spans) if isinstance(spans, bytes) else spans
        self._lives = Lifecycle(run_id, config.grace_s, config.linger_s)
        self._journal = None if folder is None else Journal(Path(folder))
        self._requests = None if folder is None else Requests(Path(folder))
        if self._journal is not None:
            for event in self._journal.events:
                self._lives.apply(event)
            self._journal.events.clear()
            self._lives.past.clear()
            if self._journal.torn:
                log.warning("%d torn bytes cut off the journal's end", self._journal.torn)
        # After the journal was read: most of its attempts are over.
        self._roster = None if folder is None else make_roster(Path(folder) / ROSTER)
        if self._roster is not None:
            self._lives.show(self._roster)
        self._clock = Clock(since=self._lives.now)
        # Nobody could be heard while this process was down.
        self._lives.heard_all(self._clock.now())
        self._last_word = dict.fromkeys(self._lives.held(), self._clock.now())
        self._last_word.pop("", None)
        self._lost: set[str] = set()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._waiters = Waiters(self._lives.ended)
        self._over: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._retired: set[str] = set()
        self._blame = Blame()
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._held = False

    async def begin(self) -> None:
        """A session of the run begins: what an earlier one left unfinished is cancelled."""
        now = self._clock.now()
        left = [life.spec.rollout_id for life in self._lives.lives()]
        self._lives.cancel(left, now)
        self._lives.forget(left, now)
        await self._written()

    async def enqueue(self, specs: Sequence[RolloutSpec]) -> int:
        """Queues rollouts in order; returns how many were new."""
        new = self._lives.enqueue(specs, self._clock.now())
        await self._written()
        self._wake(new)
        return new

    async def dequeue(self, wait_s: float, worker: str = "", request: str = "") -> Lease | None:
        """The next attempt, for the caller alone; None when there was none for `wait_s` seconds.

        Nor is there any for a worker that has retired. A `request` that is repeated gets the same
        lease again.
        """
        deadline = asyncio.get_running_loop().time() + wait_s
        self._heard_from(worker)
        while worker not in self._retired:
            replaced = (
                None if self._held else self._lives.dequeue(self._clock.now(), request, worker)
            )
            if replaced is not None:
                if replaced.number > 1:
                    self._release([f"{replaced.rollout_id}/{replaced.number - 1}"])
                await self._written()
                return replaced
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            turn = asyncio.get_running_loop().create_future()
            self._idle.append(turn)
            # Whether its turn or its time came: it looks once more.
            await asyncio.wait([turn], timeout=left)
            turn.cancel()
        return None

    async def retire(self, worker: str) -> None:
        """Gives a worker that stops nothing more: its calls that still wait here end empty.

        Ray does not end a call whose caller is gone; an attempt handed to one would be lost until
        it is overdue.
        """
        self._retired.add(worker)
        self._last_word.pop(worker, None)
        self._wake(len(self._idle))

    async def lose(self, worker: str) -> list[str]:
        """A worker is dead, as somebody knows who saw it die: what it ran is tried again.

        Returns its attempts.
        """
        self._retired.add(worker)
        self._last_word.pop(worker, None)
        lost = self._lives.lose(worker, self._clock.now())
        await self._written()
        self._release(lost)
        self._after_end(lost)
        return lost

    async def hold(self, held: bool) -> None:
        """While it is held nothing is handed out, and what ran is tried again, as a fault of ours:
        for a time in which no agent can be answered."""
        self._held = held
        if not held:
            self._wake(len(self._idle))
            return
        now = self._clock.now()
        lost = [a for worker in list(self._lives.held()) for a in self._lives.lose(worker, now)]
        await self._written()
        self._release(lost)
        self._after_end(lost)

    async def beat(self, worker: str) -> None:
        """A worker lives."""
        self._heard_from(worker)

    async def workers(self) -> list[WorkerRecord]:
        """Every worker that was heard of: how many attempts it runs, or that it is lost."""
        held, now = self._lives.held(), self._clock.now()
        return [
            WorkerRecord(worker, held.get(worker, 0), worker in self._lost, now - last)
            for worker, last in self._last_word.items()
        ]

    async def finish(self, attempt_id: str, outcome: AttemptOutcome) -> bool:
        """Takes a worker's report; False when the attempt no longer decides anything."""
        outcome = self._blame.excuse(attempt_id, outcome)
        counted = self._lives.finish(attempt_id, outcome, self._clock.now())
        await self._written()
        self._release([attempt_id])
        if counted:
            self._after_end([attempt_id])
        return counted

    async def blame(self, attempt_id: str, why: str, lost: bool) -> None:
        """An attempt met a fault of ours; see `Blame`."""
        if self._lives.live(attempt_id):
            self._blame.note(attempt_id, why, lost)

    async def door_opened(self) -> None:
        """A replica of the door begins, maybe in the place of one that died: what runs now may have
        been refused by nobody, or cut off. Clients call again; then only a failure is ours."""
        for attempt_id in self._lives.running():
            self._blame.note(attempt_id, "the gateway was replaced while it ran", lost=False)

    async def excuse(self, attempt_id: str, outcome: AttemptOutcome) -> AttemptOutcome:
        """What is made of an outcome that an attempt came to; see `Blame`."""
        return self._blame.excuse(attempt_id, outcome)

    async def engines_are_at(self, policy: str, urls: Sequence[str]) -> None:
        """A policy's engines have other addresses than the door was told when it opened."""
        self._addresses[policy] = tuple(urls)

    async def engines_of(self, policy: str) -> tuple[str, ...]:
        """Where a policy's engines are now; nothing where they are where they always were."""
        return self._addresses.get(policy, ())

    async def together(self, calls: Sequence[Call]) -> list[Any]:
        """Answers calls that came in one message (`Line`), each as if it had come alone.

        An answer may be the exception that its call raised. They share one fsync as well.
        """
        for method, _ in calls:
            if method not in _TOGETHER:
                raise ValueError(f"{method} is no call that comes with others")
        answering = (getattr(self, method)(*arguments) for method, arguments in calls)
        answers = await asyncio.gather(*answering, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, RestartingError):
                # What it told is not on disk; the whole message is to come again.
                raise answer
        return answers

    async def wait(
        self, rollout_ids: Sequence[str], timeout_s: float, at_least: int | None = None
    ) -> list[RolloutRecord]:
        """The records of those that have ended within `timeout_s` seconds, in the order asked.

        Returns once all have, or as soon as `at_least` so many have.
        """
        self._awake()
        wanted = len(rollout_ids) if at_least is None else min(at_least, len(rollout_ids))
        await self._waiters.wait(rollout_ids, timeout_s, wanted)
        await self._written()
        return [self._lives.record(r) for r in rollout_ids if self._lives.ended(r)]

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        """Cancels rollouts; their workers stop the agents."""
        stopping = self._lives.cancel(rollout_ids, self._clock.now())
        await self._written()
        self._release(stopping)
        self._waiters.notify(rollout_ids)

    async def retry(self, rollout_ids: Sequence[str]) -> list[str]:
        """Queues ended rollouts again; returns those that had ended."""
        queued = self._lives.retry(rollout_ids, self._clock.now())
        await self._written()
        self._wake(len(queued))
        return queued

    async def cancelled(self, attempt_id: str, wait_s: float | None = None) -> bool:
        """Whether the attempt is over: cancelled, overdue, replaced or reported.

        Waits for that, at most `wait_s` seconds. Its worker waits here beside the agent. Nothing
        may wait on after the attempt, for Ray does not end a call whose caller lost interest, and
        an actor has only so many.
        """
        if self._lives.live(attempt_id):
            over = self._over.setdefault(attempt_id, asyncio.Event())
            try:
                await asyncio.wait_for(over.wait(), wait_s)
            except TimeoutError:
                return False
        return True

    async def resolve(self, capability: str, telling: bool = False) -> Identity | None:
        """Whom a capability stands for while its attempt lives; `telling`, a while longer."""
        return self._lives.resolve(capability, telling)

    async def roster(self) -> tuple[str, str] | None:
        """The node and the path of the roster of running attempts; None where there is none."""
        if self._roster is None:
            return None
        return ray.get_runtime_context().get_node_id(), str(self._roster.path)

    async def counts(self) -> Counts:
        """How many rollouts stand where."""
        self._awake()
        return self._lives.counts()

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        """Drops ended rollouts from memory."""
        self._lives.forget(rollout_ids, self._clock.now())
        self._lives.past.clear()
        await self._written()

    async def _written(self) -> None:
        """Returns when all that has changed is on disk."""
        self._awake()
        events = self._lives.events
        if self._journal is None:
            events.clear()
            return
        self._journal.add(events)
        events.clear()
        try:
            await self._journal.durable()
        except InfrastructureError as error:
            raise RestartingError(str(error)) from error

    def _awake(self) -> None:
        # Not in __init__, which runs outside the event loop.
        if not self._tasks:
            self._tasks.append(asyncio.create_task(self._expire()))
            if self._spans is not None:
                self._tasks.append(asyncio.create_task(self._listen(self._spans)))

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            now = self._clock.now()
            silent, overdue = self._lives.expire(now)
            lost = []
            for worker, last in self._last_word.items():
                if worker not in self._lost and last + self._config.worker_lost_s < now:
                    log.warning("worker %s is lost", worker)
                    self._lost.add(worker)
                    lost += self._lives.lose(worker, now)
            gone = [*silent, *overdue, *lost]
            for attempt_id in gone:
                log.warning("attempt %s is unresponsive", attempt_id)
            try:
                await self._written()
                if self._journal is not None and self._journal.large:
                    self._journal.compact(self._lives.snapshot())
                await self._answer_requests()
            except InfrastructureError as error:
                log.error("the journal: %s", error)
                if self._journal is not None and self._journal.broken:
                    # Ray starts this actor again, from what is on the disk; callers repeat.
                    os._exit(1)
            # One that was only silent may go on until another attempt begins.
            self._release([attempt for attempt in gone if not self._lives.live(attempt)])
            self._after_end(gone)

    async def _answer_requests(self) -> None:
        """Does what somebody asks for by a file in the run's folder (`requests`)."""
        if self._requests is None:
            return
        for path, operation, names in await asyncio.to_thread(self._requests.take):
            answer: list[Any]
            if operation == "workers":
                answer = [(w.worker, w.state, w.silent_s) for w in await self.workers()]
            elif operation == "retry":
                answer = await self.retry(names)
            else:
                answer = [n for n in names if self._lives.known(n) and not self._lives.ended(n)]
                await self.cancel(answer)
            await asyncio.to_thread(self._requests.answer, path, answer)

    async def _listen(self, spans: SpanClient) -> None:
        listening = None
        while True:
            try:
                listening, names = await spans.activity(listening, 10)
                self._lives.heard(names, self._clock.now())
                await self._written()
            except (InfrastructureError, ray.exceptions.RayError) as error:
                log.warning("no spans can be heard: %s", error)
            await asyncio.sleep(LISTEN_EVERY_S)

    def _heard_from(self, worker: str) -> None:
        self._awake()
        if worker and worker not in self._retired:
            self._last_word[worker] = self._clock.now()
            self._lost.discard(worker)

    def _release(self, attempt_ids: Iterable[str]) -> None:
        self._blame.forget(attempt_ids)
        for attempt_id in attempt_ids:
            if (event := self._over.pop(attempt_id, None)) is not None:
                event.set()

    def _after_end(self, attempt_ids: Sequence[str]) -> None:
        # Some are queued again.
        self._wake(len(attempt_ids))
        self._waiters.notify([attempt_id.rpartition("/")[0] for attempt_id in attempt_ids])

    def _wake(self, number: int) -> None:
        while number > 0 and self._idle:
            turn = self._idle.popleft()
            if not turn.done():
                turn.set_result(None)
                number -= 1
