"""What the checks of every step found, kept in the run's `hygiene.json`.

Invariant: the file says what the steps of the run's history found; the offenders of a step that is
trained again after a resume are replaced by those of its second time.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ray.tracking import write_json
from lightning_ray.trajectories import Check, HygieneConfig, HygieneReport


class HygieneLog:
    """The first offenders of each check, over the steps of a run."""

    def __init__(self, path: Path, config: HygieneConfig):
        self._path = path
        self._config = config
        self._offenders: dict[str, list[dict[str, Any]]] = {}

    def restore(self, step: int) -> None:
        """Goes on from what an earlier life of the run wrote about its steps up to `step`."""
        if not self._path.is_file():
            return
        written = json.loads(self._path.read_text(encoding="utf-8"))["offenders"]
        self._offenders = {
            check: [entry for entry in entries if entry["step"] <= step]
            for check, entries in written.items()
        }

    def add(
        self,
        step: int,
        reports: Mapping[str, HygieneReport],
        history: Sequence[Mapping[str, float]],
    ) -> list[str]:
        """Adds a step's findings and writes the file; `history` has the steps before it.

        `reports` are of the batches of the policies that learn: what is wrong with an attempt is a
        finding of each of them. Returns a line for each check that found something for the first
        time.
        """
        news = []
        summed: dict[str, float] = {}
        for policy, report in reports.items():
            of = {"policy": policy} if len(reports) > 1 else {}
            for name, count in report.metrics().items():
                summed[name] = summed.get(name, 0.0) + count
            for check, findings in report.offenders.items():
                entries = self._offenders.setdefault(check.value, [])
                if not entries:
                    first = findings[0]
                    news.append(
                        f"hygiene: {check.value} ({report.policies[check].value}), the first in "
                        f"{first.subject}: {first.reason}"
                    )
                room = self._config.offenders - len(entries)
                entries += [
                    {"step": step, **of, **finding.to_json()} for finding in findings[:room]
                ]
        write_json(
            self._path,
            {
                "policies": {check.value: self._config.policy(check).value for check in Check},
                "totals": totals([*history, summed]),
                "offenders": {check: found for check, found in self._offenders.items() if found},
            },
        )
        return news


def totals(history: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Findings of each check that was made, over the steps of a run's history."""
    summed: dict[str, int] = {}
    for check in Check:
        found = [row[key] for row in history if (key := f"hygiene_{check.value}") in row]
        if found:
            summed[check.value] = int(sum(found))
    return summed
