"""What a search for a better prompt is about: candidates, and rollouts under them.

Invariant: plain values. Where rollouts come from, and what a prompt is put into, is for others to
know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Candidate:
    """A prompt under test."""

    text: str
    """What stands in the place of the agent's own system prompt."""
    demonstrations: tuple[tuple[str, str], ...] = ()
    """Exchanges (user, assistant) put before the agent's first message."""


@dataclass(frozen=True)
class Exchange:
    """One call of the policy: what it was asked, and what it said."""

    asked: str
    said: str
    plain: bool = True
    """Whether both are text and nothing else, as a demonstration must be."""


@dataclass(frozen=True)
class Trial:
    """One rollout under a candidate."""

    task_id: str
    score: float | None
    """Its reward; None where a fault lost it. A fault is not a zero."""
    task: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Everything that the grader said."""
    exchanges: tuple[Exchange, ...] = ()
    """The policy's calls, in order."""
    printed: str = ""
    """What the agent printed."""
    errors: str = ""
    """What it wrote to its error output."""


class PromptProposer(Protocol):
    """Writes the next candidates."""

    def learn(self, trials: Sequence[Trial]) -> None:
        """Takes note of rollouts on training tasks, whatever candidate they were under."""
        ...

    def propose(self, parent: Candidate, trials: Sequence[Trial]) -> Candidate | None:
        """A successor of `parent`, whose rollouts on a minibatch `trials` are.

        None where nothing can be proposed yet. Successors are compared with it on the same tasks.
        """
        ...
