"""How one run of an agent ended and what it printed."""

from dataclasses import dataclass
from enum import StrEnum


class AgentEnd(StrEnum):
    """The ways in which a run of an agent can end."""

    EXITED = "exited"
    """It ended by itself, with an exit code: zero or not."""
    TIMED_OUT = "timed_out"
    """It was still running when its time was up, and was stopped."""
    CANCELLED = "cancelled"
    """We stopped it, for a reason that is not its own."""
    OVER_LIMIT = "over_limit"
    """It held more memory or processes than it may, and was stopped."""
    REFUSED = "refused"
    """It is a service, and answered with an error or broke off."""
    KILLED = "killed"
    """It died of a signal that we did not send."""
    LAUNCH_FAILED = "launch_failed"
    """It never ran, or what had started it was lost: a fault of the machinery, not of the agent."""


@dataclass(frozen=True)
class AgentResult:
    """One run of an agent, as seen from outside."""

    end: AgentEnd
    exit_code: int | None
    """0 to 255, and 0 for a service's answer; None where it did not exit."""
    signal: int | None
    """Number of the signal that it died of, ours included; else None."""
    stdout: str
    """What it printed; a service's answer. UTF-8, undecodable bytes replaced."""
    stderr: str
    """As `stdout`."""
    seconds: float
    """Wall clock, from the request to its end."""
    warm: bool
    """Whether it was forked from a process that already had its libraries."""
    truncated: bool
    """Whether stdout, stderr or the result file held more than was kept."""
    cpu_seconds: float = 0.0
    """Processor time, user and system, of it and of its children that it waited for."""
    fault: str = ""
    """What went wrong with the machinery; set with LAUNCH_FAILED only."""
    reason: str = ""
    """What it did wrong, in words; set with OVER_LIMIT and REFUSED only."""
    written: str | None = None
    """What it wrote to its result file, decoded as `stdout`; None where it gives its result in
    another way."""

    @property
    def output(self) -> str:
        """The agent's result, however it gives it: what it wrote to its file, or its stdout."""
        return self.stdout if self.written is None else self.written
