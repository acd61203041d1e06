"""What the checks found, and what the policies make of it.

Invariant: `counts` has every check that was made, those without findings included; an attempt is in
`dropped` under the first check that dropped it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.trajectories.hygiene_config import Check, HygieneConfig, HygienePolicy

UNITS = {
    Check.DUPLICATE_SPANS: "spans",
    Check.DUPLICATE_TASKS: "groups",
    Check.CONSTANT_GROUPS: "groups",
    Check.CONSTANT_BATCHES: "batches",
}
"""What is counted, where it is not attempts."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    check: Check
    reason: str
    attempts: tuple[str, ...] = ()
    """The attempts that drop leaves out; none for a row that is merely repeated."""
    group: str | None = None
    span_id: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object without what is not known."""
        found: dict[str, Any] = {"reason": self.reason}
        if self.attempts:
            found["attempt_ids"] = list(self.attempts)
        if self.group is not None:
            found["group"] = self.group
        if self.span_id is not None:
            found["span_id"] = self.span_id
        return found

    @property
    def subject(self) -> str:
        """What it is about, to be named in a line of text."""
        if self.group is not None:
            return f"group {self.group}"
        if self.span_id is not None and not self.attempts:
            return f"span {self.span_id}"
        return self.attempts[0] if self.attempts else "the batch"


@dataclass
class HygieneReport:
    """The findings of one batch or folder."""

    counts: dict[Check, int]
    """Findings of every check that was made; see `UNITS`."""
    offenders: dict[Check, list[Finding]] = field(default_factory=dict)
    """The first findings of every check that has any."""
    dropped: dict[str, Check] = field(default_factory=dict)
    """Attempts to leave out, and the check that says so."""
    policies: dict[Check, HygienePolicy] = field(default_factory=dict)

    @classmethod
    def empty(cls, config: HygieneConfig) -> "HygieneReport":
        """A report without findings, of every check that is not off."""
        policies = {check: config.policy(check) for check in Check}
        made = [check for check, policy in policies.items() if policy is not HygienePolicy.off]
        return cls(dict.fromkeys(made, 0), policies=policies)

    def add(self, findings: Sequence[Finding], keep: int) -> None:
        """Counts findings, keeps the first `keep` of each check, and drops what is to be dropped.

        Findings of a check that is off are ignored.
        """
        for finding in findings:
            check = finding.check
            if check not in self.counts:
                continue
            self.counts[check] += 1
            named = self.offenders.setdefault(check, [])
            if len(named) < keep:
                named.append(finding)
            if self.policies[check] is HygienePolicy.drop:
                for attempt in finding.attempts:
                    self.dropped.setdefault(attempt, check)

    def metrics(self) -> dict[str, float]:
        """`hygiene_CHECK`: findings of every check that was made."""
        return {f"hygiene_{check.value}": float(n) for check, n in self.counts.items()}

    def stopping(self) -> list[Check]:
        """The checks that have findings and whose policy is to stop."""
        stop = HygienePolicy.stop
        return [check for check, n in self.counts.items() if n and self.policies[check] is stop]

    def why_stopped(self, where: str) -> str | None:
        """One line for the person at the terminal, or None when nothing says to stop."""
        for check in self.stopping():
            count, first = self.counts[check], self.offenders[check][0]
            return (
                f"hygiene.{check.value}=stop: {count} {unit(check, count)} {where}; the first, "
                f"{first.subject}: {first.reason}. Mend that, or leave them out with "
                f"hygiene.{check.value}=drop"
            )
        return None


def unit(check: Check, count: int) -> str:
    """What a check counts, in words."""
    many = UNITS.get(check, "attempts")
    return many if count != 1 else many.removesuffix("es") if many == "batches" else many[:-1]
