"""An evaluation: scorecards, their comparison and the gates, and its two files.

Invariant: `evaluation.json` keeps its layout (docs/evaluation.md) within one `layout` number; keys
may be added. A number that is unbounded or was not measured is null.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ray.evaluation.comparison import Comparison, compare
from lightning_ray.evaluation.config import EvaluationConfig
from lightning_ray.evaluation.gates import GateConfig, GateResult, check_gates
from lightning_ray.evaluation.measures import Interval
from lightning_ray.evaluation.outcomes import Outcome
from lightning_ray.evaluation.page import render_page
from lightning_ray.evaluation.scorecard import Measure, Scorecard, score
from lightning_ray.tracking import write_json

LAYOUT = 1


@dataclass(frozen=True)
class Side:
    """A set of rollouts under a name."""

    label: str
    outcomes: Sequence[Outcome]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    subject: Scorecard
    against: Scorecard | None
    comparison: Comparison | None
    """None without `against`, or where no task is in both."""
    gates: tuple[GateResult, ...]

    @property
    def failed_gates(self) -> list[GateResult]:
        """The gates that are not met."""
        return [gate for gate in self.gates if not gate.passed]

    def metrics(self) -> dict[str, float]:
        """What was measured, as flat numbers for a tracking run; bounds as `_low` and `_high`."""
        found: dict[str, float] = {"rollouts": self.subject.rollouts, "failed": self.subject.failed}
        for measure in self.subject.measures:
            if measure.interval is not None:
                found |= _flat(measure.name, measure.interval)
        found |= {f"reward_{name}": i.mean for name, i in self.subject.rewards.items()}
        if self.against is not None:
            for measure in self.against.measures:
                if measure.interval is not None:
                    found[f"against_{measure.name}"] = measure.interval.mean
        if self.comparison is not None:
            found |= _flat("difference", self.comparison.difference)
            found["p_value"] = self.comparison.p_value
        return {name: value for name, value in found.items() if abs(value) < float("inf")}


def evaluate(
    subject: Side, against: Side | None, config: EvaluationConfig, gate: GateConfig
) -> Evaluation:
    """Measures one or two sets of rollouts. Raises UserError for a reward that there is not."""
    card = score(subject.outcomes, config, subject.label)
    if against is None:
        return Evaluation(card, None, None, check_gates(gate, card, None))
    other = score(against.outcomes, config, against.label)
    comparison = compare(subject.outcomes, against.outcomes, config.reward)
    return Evaluation(card, other, comparison, check_gates(gate, card, comparison))


def write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    subject: Side,
    against: Side | None,
    config: EvaluationConfig,
    about: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Writes `evaluation.json` and `evaluation.html` into `folder`; returns their paths.

    `about` says what was evaluated, JSON values; it stands in both files.
    """
    written = folder / "evaluation.json"
    write_json(written, as_json(evaluation, about))
    page = folder / "evaluation.html"
    html = render_page(
        evaluation.subject,
        evaluation.against,
        evaluation.comparison,
        evaluation.gates,
        subject.outcomes,
        [] if against is None else against.outcomes,
        config.reward,
        about,
    )
    page.write_text(html, encoding="utf-8")
    return written, page


def as_json(evaluation: Evaluation, about: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of `evaluation.json`."""
    comparison = evaluation.comparison
    return {
        "layout": LAYOUT,
        "about": dict(about),
        "subject": _card(evaluation.subject),
        "against": None if evaluation.against is None else _card(evaluation.against),
        "comparison": None
        if comparison is None
        else {
            "reward": comparison.reward,
            "difference": asdict(comparison.difference),
            "p_value": comparison.p_value,
            "wins": comparison.wins,
            "ties": comparison.ties,
            "losses": comparison.losses,
            "unpaired": comparison.unpaired,
            "tasks": [
                {"task_id": p.task_id, "reward": p.reward, "against": p.against}
                for p in comparison.pairs
            ],
        },
        "gates": [asdict(gate) for gate in evaluation.gates],
        "passed": not evaluation.failed_gates,
    }


def _card(card: Scorecard) -> dict[str, Any]:
    return {
        "label": card.label,
        "rollouts": card.rollouts,
        "failed": card.failed,
        "measures": {measure.name: _measure(measure) for measure in card.measures},
        "rewards": {name: asdict(interval) for name, interval in card.rewards.items()},
    }


def _measure(measure: Measure) -> dict[str, Any]:
    interval = measure.interval
    return {
        "value": None if interval is None else interval.mean,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "n": 0 if interval is None else interval.n,
        "unit": measure.unit,
        "higher_is_better": measure.higher_is_better,
        "definition": measure.definition,
        "not_measurable": measure.missing or None,
    }


def _flat(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
