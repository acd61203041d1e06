"""How an evaluation ends: its files, its MLflow run, what is said, and the gates' exit status."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_ray.evaluation import Evaluation, EvaluationConfig, Side, write_evaluation
from lightning_ray.evaluation.page import bounds, number
from lightning_ray.tracking import TrackedRun, ui_command

JOB_TAG = "lightning_ray.job"
JOB = "evaluate"
GATE_STATUS = 3


def leave_results(
    folder: Path,
    evaluation: Evaluation,
    subject: Side,
    against: Side | None,
    config: EvaluationConfig,
    about: Mapping[str, Any],
    tracked: TrackedRun,
    say: Callable[[str], None],
) -> None:
    """Writes the JSON and HTML reports, logs them and the metrics, and says what came out."""
    written, page = write_evaluation(folder, evaluation, subject, against, config, about)
    tracked.log_metrics(evaluation.metrics(), 0)
    for path in (written, page):
        tracked.log_artifact(path)
    if evaluation.gates:
        tracked.set_tag("lightning_ray.gates", "failed" if evaluation.failed_gates else "met")
    for line in lines(evaluation):
        say(line)
    say(f"report  {page}")
    say(f"JSON    {written}")
    fragment = tracked.url_fragment.lstrip("/")
    say(f"open it in MLflow: {ui_command(tracked.uri)}   then http://127.0.0.1:5000/{fragment}")


def end_by_gates(evaluation: Evaluation) -> None:
    """Raises SystemExit(3), with one line on stderr, when a gate is not met."""
    if evaluation.failed_gates:
        failed = "; ".join(f"{g.name}={g.limit:g}: {g.reason}" for g in evaluation.failed_gates)
        print(f"gate failed: {failed}", file=sys.stderr)
        raise SystemExit(GATE_STATUS)


def lines(evaluation: Evaluation) -> list[str]:
    """The evaluation as lines for a terminal."""
    said = []
    cards = [evaluation.subject] + ([evaluation.against] if evaluation.against else [])
    for card in cards:
        said.append(f"{card.label}: {card.rollouts} rollouts, {card.failed} failed")
        for measure in card.measures:
            if measure.interval is None:
                said.append(f"  {measure.title:18}  not measurable: {measure.missing}")
                continue
            value = number(measure.interval.mean) + (" USD" if measure.unit == "usd" else "")
            interval = bounds(measure.interval)
            said.append(f"  {measure.title:18}  {value}  ({interval})  n {measure.interval.n}")
    if (compared := evaluation.comparison) is not None:
        difference = compared.difference
        said.append(
            f"paired on {len(compared.pairs)} tasks: {compared.reward} {difference.mean:+.4g} "
            f"({bounds(difference)}), p {compared.p_value:.2g}, {compared.wins} wins, "
            f"{compared.ties} ties, {compared.losses} losses"
        )
    elif evaluation.against is not None:
        said.append("not paired: no task with this reward is in both")
    said += [
        f"gate {g.name}={g.limit:g} met ({number(g.value)})" for g in evaluation.gates if g.passed
    ]
    return said
