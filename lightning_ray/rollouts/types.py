"""Rollouts and attempts: what they are called and how they can end."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lightning_ray.policies import PromptVersion
from lightning_ray.rollouts.roster import NOWHERE


class RolloutStatus(StrEnum):
    """Where a rollout stands."""

    QUEUED = "queued"
    """Waiting for a worker: new, or to be tried again."""
    RUNNING = "running"
    """Its latest attempt is with a worker."""
    SUCCEEDED = "succeeded"
    """An attempt came to an outcome of the agent, and was graded."""
    FAILED = "failed"
    """Every attempt failed. It has no reward: it is left out of training and counted."""
    CANCELLED = "cancelled"
    """Somebody stopped it."""

    @property
    def ended(self) -> bool:
        """No further attempt will be made."""
        return self in (RolloutStatus.SUCCEEDED, RolloutStatus.FAILED, RolloutStatus.CANCELLED)


class AttemptStatus(StrEnum):
    """Where an attempt stands."""

    RUNNING = "running"
    """A worker has it."""
    SUCCEEDED = "succeeded"
    """The agent ended by itself and its result was graded."""
    FAILED = "failed"
    """The agent crashed, could not be started, or its grader raised."""
    TIMED_OUT = "timed_out"
    """The agent was stopped at its time limit."""
    UNRESPONSIVE = "unresponsive"
    """Nothing was heard of it for too long: it was silent, or its worker is lost or overdue."""
    CANCELLED = "cancelled"
    """Its rollout was cancelled."""


RETRIED = (AttemptStatus.FAILED, AttemptStatus.TIMED_OUT, AttemptStatus.UNRESPONSIVE)
"""The ends after which another attempt may be made."""


@dataclass(frozen=True)
class RolloutSpec:
    """A rollout as it is asked for. Ids are the caller's, so that asking twice is harmless."""

    rollout_id: str
    task_id: str
    task: dict[str, Any]
    timeout_s: float
    max_attempts: int = 2
    group_id: str = ""
    """Rollouts of one group are samples of the same task, compared with each other."""
    prompts: tuple[PromptVersion, ...] = ()
    """Prompts that the gateway puts in the place of the agent's own in this rollout."""
    note_messages: bool = False
    """Whether the gateway keeps what was said in each call as text, beside an engine's tokens."""
    silence_s: float = 0.0
    """An attempt without a span for so long is unresponsive, seconds; 0 sets no limit."""
    retry_on: tuple[AttemptStatus, ...] = RETRIED
    """The ends of an attempt after which the agent is tried again."""
    priority: int = 0
    """Higher ones are handed out first; those of one priority in the order of their arrival."""
    max_faults: int = 3
    """Times that it is tried again after a fault of ours; none of them is an agent's attempt."""
    sampling: dict[str, float] = field(default_factory=dict)
    """What is set of how its calls are sampled, by name (`inference.SamplingConfig`)."""
    answered_by: dict[str, str] = field(default_factory=dict)
    """Who answers for a policy in this rollout, in place of those that do in all others."""


@dataclass(frozen=True)
class Lease:
    """One attempt, given to one worker."""

    run_id: str
    rollout_id: str
    attempt_id: str
    number: int
    """Counts a rollout's attempts from 1."""
    task_id: str
    task: dict[str, Any]
    timeout_s: float
    capability: str
    """The secret part of the attempt's base URL; opens the gateway while the attempt lives."""
    group_id: str = ""
    """As in the rollout's spec."""


@dataclass(frozen=True)
class Identity:
    """Who a capability stands for."""

    run_id: str
    rollout_id: str
    attempt_id: str
    prompts: tuple[PromptVersion, ...] = ()
    """As in the rollout's spec."""
    note_messages: bool = False
    """As in the rollout's spec."""
    sampling: dict[str, float] = field(default_factory=dict)
    """As in the rollout's spec."""
    answered_by: dict[str, str] = field(default_factory=dict)
    """As in the rollout's spec."""
    seat: int = field(default=NOWHERE, compare=False)
    """Where the queue's roster has the attempt; another one after the queue restarted."""


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended, as its worker reports it."""

    status: AttemptStatus
    rewards: dict[str, float] = field(default_factory=dict)
    """Named rewards of a succeeded attempt; "reward" is among them."""
    result: str = ""
    """What the agent printed, cut to a length that can be shown."""
    error: str = ""
    """Why it did not succeed, with the end of the agent's stderr."""
    seconds: float = 0.0
    warm: bool = False
    fault: bool = False
    """Whether the cause of a failure is ours (a lost worker, a store that is down), not the
    agent's."""


@dataclass(frozen=True)
class WorkerRecord:
    """A worker as the queue knows it."""

    worker: str
    running: int
    """Attempts that it has; none means that it is idle."""
    lost: bool
    silent_s: float
    """Seconds since its last word."""

    @property
    def state(self) -> str:
        """ "idle", "busy N" or "lost"."""
        if self.lost:
            return "lost"
        return f"busy {self.running}" if self.running else "idle"


@dataclass(frozen=True)
class AttemptRecord:
    """An attempt as the queue knows it. Times are the queue's wall seconds."""

    attempt_id: str
    status: AttemptStatus
    worker: str
    began: float
    ended: float | None
    """None while it runs."""
    outcome: AttemptOutcome | None


@dataclass(frozen=True)
class RolloutRecord:
    """A rollout as its latest attempt left it."""

    spec: RolloutSpec
    status: RolloutStatus
    attempts: tuple[tuple[str, AttemptStatus], ...]
    """Every attempt's id and status, oldest first."""
    outcome: AttemptOutcome | None
    """Of the latest attempt that ended."""
    faulted: bool = False
    """Whether it failed of faults of ours: it says nothing about the agent."""

    @property
    def attempt_id(self) -> str:
        """The latest attempt, which decides the rollout. Raises IndexError before the first."""
        return self.attempts[-1][0]
