"""What a policy version scored on held-out tasks, and what could not be scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_ray.evaluation.measures import Interval, completion_quality
from lightning_ray.tracking.summary import write_json


@dataclass(frozen=True)
class HeldoutReport:
    """The measures of one version on held-out tasks."""

    policy: str
    version: int
    step: int
    """The training step after which it was measured; 0 before training."""
    measures: Mapping[str, Interval]
    """By reward name."""
    n: int
    """Rollouts that were measured."""
    failed: int
    """Rollouts lost to a fault of the infrastructure; they are in no measure."""

    @classmethod
    def from_rewards(
        cls,
        rewards: Sequence[Mapping[str, float] | None],
        *,
        policy: str,
        version: int,
        step: int,
    ) -> "HeldoutReport":
        """Measure the rewards of each rollout by name; None stands for one that a fault lost.

        A rollout without some reward that others have counts in the measures of those it has.
        """
        measured = [row for row in rewards if row is not None]
        names = list(dict.fromkeys(name for row in measured for name in row))
        return cls(
            policy=policy,
            version=version,
            step=step,
            measures={
                name: completion_quality([row.get(name, math.nan) for row in measured])
                for name in names
            },
            n=len(measured),
            failed=len(rewards) - len(measured),
        )


def write_report(path: Path, report: HeldoutReport) -> None:
    """Write `report` to the JSON file `path`, whole or not at all; bounds at infinity are null."""
    write_json(path, asdict(report))
