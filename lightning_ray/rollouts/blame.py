"""Attempts that met a fault of ours while they ran, and what that makes of their outcome.

Invariant: a fault of the infrastructure is no reward, and costs the agent none of its attempts. An
answer that was cut off on its way is lost to the agent, whatever it makes of it: its outcome does
not count. A call that was refused could be made again, as clients do: then only a failure is ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_ray.rollouts.types import AttemptOutcome, AttemptStatus


@dataclass(frozen=True)
class _Fault:
    why: str
    lost: bool


class Blame:
    """Of attempts that run; in memory alone, for what it is about ends within minutes."""

    def __init__(self) -> None:
        self._faults: dict[str, _Fault] = {}

    def note(self, attempt_id: str, why: str, lost: bool) -> None:
        """An attempt met a fault; `lost` says that an answer was cut off."""
        earlier = self._faults.get(attempt_id)
        if earlier is None or (lost and not earlier.lost):
            self._faults[attempt_id] = _Fault(why, lost)

    def excuse(self, attempt_id: str, outcome: AttemptOutcome) -> AttemptOutcome:
        """What is made of an attempt's outcome, as its worker reports it."""
        fault = self._faults.get(attempt_id)
        if fault is None or outcome.fault or outcome.status is AttemptStatus.CANCELLED:
            return outcome
        if outcome.status is AttemptStatus.SUCCEEDED and not fault.lost:
            return outcome
        error = f"{fault.why}\n{outcome.error}".strip()
        return replace(outcome, status=AttemptStatus.FAILED, rewards={}, error=error, fault=True)

    def forget(self, attempt_ids: Iterable[str]) -> None:
        """These attempts are over."""
        for attempt_id in attempt_ids:
            self._faults.pop(attempt_id, None)
