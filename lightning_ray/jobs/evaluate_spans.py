"""lightning-ray evaluate spans=...: the operator's measures over spans that are there already.

Invariant: no Ray is started and no model is loaded.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_ray.errors import UserError
from lightning_ray.evaluation import (
    EvaluationConfig,
    GateConfig,
    Side,
    check_evaluation,
    check_gate,
    evaluate,
    read_outcomes,
)
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.jobs.evaluate_results import JOB, JOB_TAG, end_by_gates, leave_results
from lightning_ray.spans import has_spans, read_folder
from lightning_ray.tracking import TrackedRun, TrackingConfig
from lightning_ray.tracking.mlflow_run import RunStatus


@dataclass
class EvaluateSpansConfig:
    """What measuring spans takes."""

    output_dir: str = "outputs"
    """Folder that holds runs; the report lies there, in a folder of its own."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def evaluate_spans(words: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Measures the spans that `words` name. Raises UserError, and SystemExit(3) for gates."""
    config: EvaluateSpansConfig = compose_config("evaluate_spans", EvaluateSpansConfig, overrides)
    check_evaluation(config.evaluation)
    compared = "against" in words or "against_where" in words
    check_gate(config.gate, compared)
    root = Path(config.output_dir)
    place = find_spans(root, "spans", words["spans"])
    where = words.get("where")
    against = None
    if compared:
        other = find_spans(root, "against", words["against"]) if "against" in words else place
        other_where = words.get("against_where", where)
        if (other.resolve(), other_where) == (place.resolve(), where):
            raise UserError("against: these are the same spans; give them another against_where")
        against = _read(config, other, "against_where", other_where)
    subject = _read(config, place, "where", where)
    evaluation = evaluate(subject, against, config.evaluation, config.gate)
    run_id = f"measures-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = root.absolute() / run_id
    tracked = TrackedRun.start(config.tracking, root, run_id, tags={JOB_TAG: JOB})
    status = RunStatus.FAILED
    try:
        tracked.log_config(resolved(config) | {"words": dict(words)})
        folder.mkdir(parents=True)
        about = {"spans": str(place), **{k: v for k, v in words.items() if k != "spans"}}
        leave_results(folder, evaluation, subject, against, config.evaluation, about, tracked, _say)
        status = RunStatus.FINISHED
    finally:
        tracked.finish(status)
    end_by_gates(evaluation)


def find_spans(root: Path, key: str, name: str) -> Path:
    """The folder of spans that a run's id, a run's folder or a folder of segments names.

    Raises UserError, beginning with `key`=, when there is none.
    """
    for candidate in (root / name / "spans", Path(name) / "spans", root / name, Path(name)):
        if has_spans(candidate):
            return candidate
    known = sorted(path.parent.name for path in root.glob("*/spans") if has_spans(path))
    there = f"the runs with spans: {', '.join(known[-5:])}" if known else "no run there has any"
    raise UserError(f"{key}={name}: no such run in {root}, and no folder with spans; {there}")


def _read(config: EvaluateSpansConfig, place: Path, key: str, where: str | None) -> Side:
    spans = read_folder(place)
    words = config.evaluation.measures.rollback_words
    outcomes = read_outcomes(spans, rollback_words=words, where=where)
    run = place.parent.name if place.name == "spans" else place.name
    if not outcomes:
        said = "no rollouts" if where is None else f"{key}={where}: no rollout has such a span"
        raise UserError(f"{said} in {place}")
    return Side(run if where is None else f"{run} where {where}", outcomes)


def _say(line: str) -> None:
    print(line, flush=True)
