"""Rollouts and attempts: what they are called and how they can end."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lightning_ray.policies import PromptVersion


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
    """Its worker did not report in time: a fault of ours, not of the agent."""
    CANCELLED = "cancelled"
    """Its rollout was cancelled."""


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


@dataclass(frozen=True)
class RolloutRecord:
    """A rollout as its latest attempt left it."""

    spec: RolloutSpec
    status: RolloutStatus
    attempts: tuple[tuple[str, AttemptStatus], ...]
    """Every attempt's id and status, oldest first."""
    outcome: AttemptOutcome | None
    """Of the latest attempt that ended."""

    @property
    def attempt_id(self) -> str:
        """The latest attempt, which decides the rollout. Raises IndexError before the first."""
        return self.attempts[-1][0]
