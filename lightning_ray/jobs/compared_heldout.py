"""The held-out scores of runs side by side, and how far the others are from the first.

Invariant: a difference is paired by task wherever the spans of both runs allow it, and says which
it is; without an interval of either run there is no difference, only the two means.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_ray.errors import InfrastructureError
from lightning_ray.evaluation import (
    Difference,
    Interval,
    TaskScores,
    completion_quality,
    heldout_scores,
    paired,
    unpaired,
)
from lightning_ray.tracking import RecordedRun
from lightning_ray.tracking.comparing import HELDOUT, heldout, heldout_measures

_SOURCE = "evaluation.tasks"


@dataclass(frozen=True)
class _Score:
    mean: float | None
    interval: Interval | None
    tasks: TaskScores | None


@dataclass(frozen=True)
class Compared:
    """One measure on held-out tasks; each list has an entry a run, None where not scored."""

    measure: str
    before: list[float | None]
    before_interval: list[Interval | None]
    after: list[float | None]
    after_interval: list[Interval | None]
    gain: list[Difference | None]
    """After minus before, within a run."""
    difference: list[Difference | None]
    """After training: each run minus the first; None for the first itself."""

    def rows(self) -> dict[str, list[str]]:
        """Rows of a table: words, and one text a run."""
        gains = ["-" if gain is None else _signed(gain.interval) for gain in self.gain]
        return {
            f"held-out {self.measure} before": _shown(self.before, self.before_interval),
            f"held-out {self.measure} after": _shown(self.after, self.after_interval),
            f"  gain in {self.measure}": gains,
        }

    def lines(self, labels: Sequence[str]) -> list[str]:
        """One line a run after the first: how it differs from the first, and how sure that is."""
        lines = []
        for name, difference in list(zip(labels, self.difference, strict=True))[1:]:
            what = f"held-out {self.measure} after training, {name} - {labels[0]}:"
            if difference is None:
                lines.append(f"{what} not known, one of them lacks a score with an interval")
                continue
            how = (
                f"paired over {difference.interval.n} tasks"
                + (f", {difference.unmatched} without a partner" if difference.unmatched else "")
                if difference.paired
                else f"unpaired, {difference.interval.n} rollouts or more each"
            )
            low, high = difference.interval.low, difference.interval.high
            sure = "the interval holds 0" if low <= 0 <= high else "the interval excludes 0"
            lines.append(f"{what} {_signed(difference.interval)}, {how}; {sure}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def compare_heldout(runs: Sequence[RecordedRun], notes: list[str]) -> list[Compared]:
    """Every measure of the runs. What could not be read is added to `notes`."""
    scores = [_tasks(run, notes) for run in runs]
    return [_compared(runs, scores, measure) for measure in heldout_measures(runs)]


def _compared(
    runs: Sequence[RecordedRun], tasks: Sequence[dict[int, TaskScores]], measure: str
) -> Compared:
    before = [_score(*pair, measure, after=False) for pair in zip(runs, tasks, strict=True)]
    after = [_score(*pair, measure, after=True) for pair in zip(runs, tasks, strict=True)]
    sources = [run.config.get(_SOURCE) for run in runs]
    return Compared(
        measure=measure,
        before=[score.mean for score in before],
        before_interval=[score.interval for score in before],
        after=[score.mean for score in after],
        after_interval=[score.interval for score in after],
        gain=[
            _difference(measure, one, two, same_source=True)
            for one, two in zip(before, after, strict=True)
        ],
        difference=[
            None
            if at == 0
            else _difference(measure, after[0], other, same_source=source == sources[0])
            for at, (other, source) in enumerate(zip(after, sources, strict=True))
        ],
    )


def _difference(
    measure: str, first: _Score, second: _Score, *, same_source: bool
) -> Difference | None:
    if first.tasks is not None and second.tasks is not None:
        found = paired(measure, first.tasks, second.tasks, same_source=same_source)
        if found is not None:
            return found
    if first.interval is None or second.interval is None:
        return None
    return unpaired(measure, first.interval, second.interval)


def _score(run: RecordedRun, tasks: dict[int, TaskScores], measure: str, *, after: bool) -> _Score:
    mean = heldout(run, measure, after=after)
    if mean is None:
        return _Score(None, None, None)
    step = _step(run, measure, after=after)
    scores = tasks.get(step)
    interval = _reported(run, measure, step, after=after)
    if interval is None and scores is not None and scores.rewards.get(measure):
        interval = completion_quality(list(scores.rewards[measure].values()))
    return _Score(mean, interval, scores)


def _step(run: RecordedRun, measure: str, *, after: bool) -> int:
    steps = [row["step"] for row in run.scored if HELDOUT + measure in row]
    return int(max(step for step in steps if (step > 0) is after))


def _reported(run: RecordedRun, measure: str, step: int, *, after: bool) -> Interval | None:
    """The interval in the run's summary, where that is of this step: a resumed run's may be old."""
    if run.summary is None:
        return None
    report = run.summary.extra.get("heldout_after_report" if after else "heldout_before_report")
    if not report or report["step"] != step or measure not in report["measures"]:
        return None
    found = report["measures"][measure]
    low = -math.inf if found["low"] is None else found["low"]
    high = math.inf if found["high"] is None else found["high"]
    return Interval(found["mean"], low, high, found["n"])


def _tasks(run: RecordedRun, notes: list[str]) -> dict[int, TaskScores]:
    if run.folder is None or not (run.folder / "spans").is_dir():
        notes.append(f"{run.name}: no spans here, so its tasks cannot be paired")
        return {}
    try:
        return heldout_scores(run.folder / "spans")
    except InfrastructureError as error:
        notes.append(f"{run.name}: {error}, so its tasks cannot be paired")
        return {}


def _shown(means: Sequence[float | None], intervals: Sequence[Interval | None]) -> list[str]:
    shown = []
    for mean, interval in zip(means, intervals, strict=True):
        if mean is None:
            shown.append("-")
        elif interval is None:
            shown.append(f"{mean:.3f}")
        else:
            shown.append(f"{mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
    return shown


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
