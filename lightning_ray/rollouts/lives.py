"""What is kept of one rollout, and how many of them stand where.

Invariant: `Tally` is what counting all remembered rollouts would give, at any time.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_ray.rollouts.types import (
    AttemptOutcome,
    AttemptRecord,
    AttemptStatus,
    Lease,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
)

Event = tuple[Any, ...]
"""(kind, now, name of the rollout or attempt, what else belongs to it)."""


class Expired(NamedTuple):
    """Attempts that ended because nothing was heard of them, by their ids."""

    silent: list[str]
    """No span came; one that comes still revives it."""
    overdue: list[str]
    """Not reported in time; their agents must stop."""


@dataclass
class Attempt:
    """One try."""

    attempt_id: str
    digest: bytes
    """Of its capability."""
    deadline: float
    worker: str
    request: bytes
    """Digest of the request that took it."""
    began: float
    status: AttemptStatus = AttemptStatus.RUNNING
    outcome: AttemptOutcome | None = None
    ended: float | None = None
    heard: float = 0.0
    """When its last span came, or it began."""
    live: bool = True
    """Whether its capability opens the gateway."""


@dataclass
class Life:
    """One rollout."""

    spec: RolloutSpec
    status: RolloutStatus = RolloutStatus.QUEUED
    attempts: list[Attempt] = field(default_factory=list)
    outcome: AttemptOutcome | None = None
    tries: int = 0
    """Attempts that the agent has used up."""
    faults: int = 0
    """Attempts that faults of ours have spoilt."""
    retried: int = 0
    """Attempts there were when somebody last retried it."""
    ticket: int = -1
    """Its place in the order of arrival while it is queued."""

    @property
    def faulted(self) -> bool:
        """Whether it failed of a fault of ours."""
        failed = self.status is RolloutStatus.FAILED
        return failed and self.outcome is not None and self.outcome.fault

    def record(self) -> RolloutRecord:
        """What others are told of it."""
        attempts = tuple((a.attempt_id, a.status) for a in self.attempts)
        return RolloutRecord(self.spec, self.status, attempts, self.outcome, self.faulted)

    def lease(self, run_id: str, capability: str) -> Lease:
        """Its latest attempt, as a worker gets it."""
        spec = self.spec
        return Lease(
            run_id=run_id,
            rollout_id=spec.rollout_id,
            attempt_id=self.attempts[-1].attempt_id,
            number=len(self.attempts),
            task_id=spec.task_id,
            task=spec.task,
            timeout_s=spec.timeout_s,
            capability=capability,
            group_id=spec.group_id,
        )

    def history(self) -> list[AttemptRecord]:
        """Its attempts, oldest first."""
        return [
            AttemptRecord(a.attempt_id, a.status, a.worker, a.began, a.ended, a.outcome)
            for a in self.attempts
        ]


def suspended(life: Life, attempt: Attempt) -> bool:
    """Whether a rollout's latest attempt is unresponsive and nobody has replaced it yet."""
    return (
        attempt.status is AttemptStatus.UNRESPONSIVE
        and life.status is RolloutStatus.QUEUED
        and len(life.attempts) > life.retried
    )


class Ready(NamedTuple):
    """A place in the queue; the lowest is next. It holds while its rollout has the same ticket."""

    urgency: int
    ticket: int
    rollout_id: str


class Due(NamedTuple):
    """When an attempt is to be looked at again."""

    at: float
    attempt_id: str
    silence: bool


@dataclass(frozen=True)
class Counts:
    """How many rollouts stand where."""

    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    attempts: int
    """Ever begun, those of forgotten rollouts among them."""
    faulted: int = 0
    """Of the failed ones, those that failed of faults of ours."""


class Tally:
    """Counts that are kept, not counted."""

    def __init__(self) -> None:
        self.attempts = 0
        self._standing = dict.fromkeys(RolloutStatus, 0)
        self._faulted = 0

    def add(self, life: Life) -> None:
        """A rollout that is new here."""
        self._count(life, 1)

    def drop(self, life: Life) -> None:
        """A rollout that is no longer remembered."""
        self._count(life, -1)

    def move(self, life: Life, status: RolloutStatus) -> None:
        """Gives a rollout its next status; its outcome was set before."""
        self._standing[life.status] -= 1
        # It leaves `failed` by a retry only, which keeps its outcome.
        self._faulted -= life.faulted
        life.status = status
        self._standing[status] += 1
        self._faulted += life.faulted

    def counts(self) -> Counts:
        """How many stand where."""
        standing = {status.value: count for status, count in self._standing.items()}
        return Counts(**standing, attempts=self.attempts, faulted=self._faulted)

    def _count(self, life: Life, by: int) -> None:
        self._standing[life.status] += by
        self._faulted += by * life.faulted
