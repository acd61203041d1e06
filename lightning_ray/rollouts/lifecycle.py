"""The life of rollouts, as a state machine without clocks, processes or network.

Invariants: each dequeue makes a new attempt and gives it to one caller; only the latest attempt
decides its rollout; a rollout that ended stays as it ended; a capability opens the gateway while
its attempt is the running one and never again, but for what the attempt still has to tell: that is
taken for `linger_s` seconds more. `now` is a number of seconds that the caller takes
from one clock and that never goes back.
"""

import hashlib
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_ray.rollouts.types import (
    AttemptOutcome,
    AttemptStatus,
    Identity,
    Lease,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
)
from lightning_ray.spans import attempt_id_of


@dataclass
class _Attempt:
    number: int
    attempt_id: str
    status: AttemptStatus
    deadline: float
    digest: bytes


@dataclass
class _Rollout:
    spec: RolloutSpec
    status: RolloutStatus = RolloutStatus.QUEUED
    attempts: list[_Attempt] = field(default_factory=list)
    outcome: AttemptOutcome | None = None


@dataclass(frozen=True)
class Counts:
    """How many rollouts stand where."""

    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    attempts: int


class Lifecycle:
    """The rollouts of one run."""

    def __init__(self, run_id: str, grace_s: float, linger_s: float = 0.0):
        """`grace_s`: an attempt not reported this long after its timeout is unresponsive.

        `linger_s`: so long after its end an attempt's telemetry is still taken, at least.
        """
        self._run_id = run_id
        self._grace_s = grace_s
        self._rollouts: OrderedDict[str, _Rollout] = OrderedDict()
        self._queue: deque[str] = deque()
        self._open: dict[bytes, Identity] = {}
        self._linger_s = linger_s
        self._closed: dict[bytes, Identity] = {}
        self._closing: list[bytes] = []
        self._until: deque[tuple[float, bytes]] = deque()
        self._attempts = 0

    def enqueue(self, specs: Iterable[RolloutSpec]) -> int:
        """Queues rollouts in their order; an id that is known already is left as it is.

        Returns how many were new.
        """
        new = 0
        for spec in specs:
            if spec.rollout_id not in self._rollouts:
                self._rollouts[spec.rollout_id] = _Rollout(spec)
                self._queue.append(spec.rollout_id)
                new += 1
        return new

    def dequeue(self, now: float) -> Lease | None:
        """Makes the next attempt, or returns None when nothing is queued."""
        while self._queue:
            rollout = self._rollouts.get(self._queue.popleft())
            if rollout is not None and rollout.status is RolloutStatus.QUEUED:
                return self._begin(rollout, now)
        return None

    def finish(self, attempt_id: str, outcome: AttemptOutcome) -> bool:
        """Takes a worker's report. Returns False, and changes nothing, when it comes too late.

        Late is: for an attempt that is not the running one of its rollout any more.
        """
        found = self._running_attempt(attempt_id)
        if found is None:
            return False
        self._end(*found, outcome)
        return True

    def cancel(self, rollout_ids: Iterable[str]) -> list[str]:
        """Cancels rollouts that have not ended; returns the attempts whose agents must stop."""
        stopping = []
        for rollout_id in rollout_ids:
            rollout = self._rollouts.get(rollout_id)
            if rollout is None or rollout.status.ended:
                continue
            if rollout.status is RolloutStatus.RUNNING:
                attempt = rollout.attempts[-1]
                attempt.status = AttemptStatus.CANCELLED
                self._close(attempt)
                stopping.append(attempt.attempt_id)
            rollout.status = RolloutStatus.CANCELLED
        return stopping

    def expire(self, now: float) -> list[str]:
        """Ends the attempts whose worker is overdue; returns their ids."""
        overdue = []
        for rollout in self._rollouts.values():
            if rollout.status is RolloutStatus.RUNNING and rollout.attempts[-1].deadline < now:
                attempt = rollout.attempts[-1]
                lost = AttemptOutcome(
                    AttemptStatus.UNRESPONSIVE, error="its worker did not report in time"
                )
                self._end(rollout, attempt, lost)
                overdue.append(attempt.attempt_id)
        # Ends come without a time: they are given the one of the look that first finds them.
        self._until += [(now + self._linger_s, digest) for digest in self._closing]
        self._closing.clear()
        while self._until and self._until[0][0] < now:
            self._closed.pop(self._until.popleft()[1], None)
        return overdue

    def resolve(self, capability: str, telling: bool = False) -> Identity | None:
        """Whom a capability stands for, or None when it is unknown or its attempt has ended.

        `telling`: for telemetry and rewards, which an attempt may send until a while after its end.
        """
        digest = _digest(capability)
        identity = self._open.get(digest)
        return self._closed.get(digest) if identity is None and telling else identity

    def record(self, rollout_id: str) -> RolloutRecord:
        """The rollout as it stands. Raises KeyError for an unknown id."""
        rollout = self._rollouts[rollout_id]
        attempts = tuple((a.attempt_id, a.status) for a in rollout.attempts)
        return RolloutRecord(rollout.spec, rollout.status, attempts, rollout.outcome)

    def ended(self, rollout_id: str) -> bool:
        """Whether no further attempt will be made. Raises KeyError for an unknown id."""
        return self._rollouts[rollout_id].status.ended

    def forget(self, rollout_ids: Iterable[str]) -> None:
        """Drops rollouts that ended from memory; their spans stay in the store."""
        for rollout_id in rollout_ids:
            rollout = self._rollouts.get(rollout_id)
            if rollout is not None and rollout.status.ended:
                del self._rollouts[rollout_id]

    def counts(self) -> Counts:
        """How many rollouts stand where, of those that are remembered."""
        statuses = [rollout.status for rollout in self._rollouts.values()]
        return Counts(
            queued=statuses.count(RolloutStatus.QUEUED),
            running=statuses.count(RolloutStatus.RUNNING),
            succeeded=statuses.count(RolloutStatus.SUCCEEDED),
            failed=statuses.count(RolloutStatus.FAILED),
            cancelled=statuses.count(RolloutStatus.CANCELLED),
            attempts=self._attempts,
        )

    def _begin(self, rollout: _Rollout, now: float) -> Lease:
        spec = rollout.spec
        number = len(rollout.attempts) + 1
        capability = secrets.token_urlsafe(24)
        attempt = _Attempt(
            number=number,
            attempt_id=attempt_id_of(spec.rollout_id, number),
            status=AttemptStatus.RUNNING,
            deadline=now + spec.timeout_s + self._grace_s,
            digest=_digest(capability),
        )
        rollout.attempts.append(attempt)
        rollout.status = RolloutStatus.RUNNING
        self._attempts += 1
        self._open[attempt.digest] = Identity(
            self._run_id, spec.rollout_id, attempt.attempt_id, spec.prompts, spec.note_messages
        )
        return Lease(
            run_id=self._run_id,
            rollout_id=spec.rollout_id,
            attempt_id=attempt.attempt_id,
            number=number,
            task_id=spec.task_id,
            task=spec.task,
            timeout_s=spec.timeout_s,
            capability=capability,
            group_id=spec.group_id,
        )

    def _end(self, rollout: _Rollout, attempt: _Attempt, outcome: AttemptOutcome) -> None:
        attempt.status = outcome.status
        self._close(attempt)
        rollout.outcome = outcome
        if outcome.status is AttemptStatus.SUCCEEDED:
            rollout.status = RolloutStatus.SUCCEEDED
        elif outcome.status is AttemptStatus.CANCELLED:
            rollout.status = RolloutStatus.CANCELLED
        elif len(rollout.attempts) < rollout.spec.max_attempts:
            rollout.status = RolloutStatus.QUEUED
            self._queue.append(rollout.spec.rollout_id)
        else:
            rollout.status = RolloutStatus.FAILED

    def _close(self, attempt: _Attempt) -> None:
        identity = self._open.pop(attempt.digest, None)
        if identity is not None and self._linger_s > 0:
            self._closed[attempt.digest] = identity
            self._closing.append(attempt.digest)

    def _running_attempt(self, attempt_id: str) -> tuple[_Rollout, _Attempt] | None:
        rollout = self._rollouts.get(attempt_id.rpartition("/")[0])
        if rollout is None or rollout.status is not RolloutStatus.RUNNING:
            return None
        attempt = rollout.attempts[-1]
        return (rollout, attempt) if attempt.attempt_id == attempt_id else None


def _digest(capability: str) -> bytes:
    # Kept hashed: whoever reads the queue's memory learns no live capability.
    return hashlib.sha256(capability.encode()).digest()
