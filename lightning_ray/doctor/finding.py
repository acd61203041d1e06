"""What a check found, and the report of all of them, as text and as JSON.

Invariant: a finding that is not ok says what to change.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

_WIDTH = 100
_TITLE = 20


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """Training works, but worse or at more cost than it could."""
    MISSING = "missing"
    """A trainer cannot learn from the agent as it is."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    title: str
    found: str
    change: str = ""
    """What to change; empty where nothing needs to."""

    def __post_init__(self) -> None:
        if self.level is not Level.OK and not self.change:
            raise ValueError(f"finding {self.title!r} does not say what to change")


def ok(title: str, found: str) -> Finding:
    """Nothing to change."""
    return Finding(Level.OK, title, found)


def warning(title: str, found: str, change: str) -> Finding:
    """Training works all the same."""
    return Finding(Level.WARNING, title, found, change)


def missing(title: str, found: str, change: str) -> Finding:
    """Training does not work so."""
    return Finding(Level.MISSING, title, found, change)


@dataclass(frozen=True)
class Report:
    """Everything that was found of one agent."""

    command: Sequence[str]
    runs: int
    findings: Sequence[Finding]
    experiment: str
    """A file for Hydra's group `experiment` that would train the agent, YAML."""
    train_command: str
    """How to train it with that file."""

    @property
    def trainable(self) -> bool:
        """Whether nothing is missing."""
        return not self.lacking

    @property
    def lacking(self) -> list[Finding]:
        """The findings that stand in the way of training."""
        return [finding for finding in self.findings if finding.level is Level.MISSING]

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.trainable:
            return "not yet: " + ", ".join(finding.title for finding in self.lacking)
        warnings = sum(finding.level is Level.WARNING for finding in self.findings)
        more = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
        return f"a trainer can learn from this agent{more}"

    def text(self) -> str:
        """The report as a terminal shows it."""
        lines = []
        for finding in self.findings:
            head = f"{finding.level:<8} {finding.title:<{_TITLE}} "
            lines += _wrap(finding.found, head)
            if finding.change:
                lines += _wrap(f"change: {finding.change}", " " * len(head))
        lines += ["", f"verdict: {self.verdict}"]
        if self.trainable:
            lines += ["", "to train it, write conf/experiment/mine.yaml:", ""]
            lines += [f"    {line}" for line in self.experiment.splitlines()]
            lines += ["", "and type:", "", f"    {self.train_command}"]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """The same, as plain values."""
        return {
            "command": list(self.command),
            "runs": self.runs,
            "trainable": self.trainable,
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
            "experiment": self.experiment,
            "train_command": self.train_command,
        }


def _wrap(text: str, head: str) -> list[str]:
    """`text` beside `head`; its own line breaks stay, and so does every space of a command."""
    indent = " " * len(head)
    lines = []
    for part in text.splitlines() or [""]:
        lines += textwrap.wrap(
            part, _WIDTH - len(head), break_long_words=False, break_on_hyphens=False
        ) or [""]
    return [f"{head if place == 0 else indent}{line}".rstrip() for place, line in enumerate(lines)]
