"""What a run of supervised tuning leaves: held-out reports, a learning curve, summary.json."""

from dataclasses import asdict
from typing import Any

from lightning_ray.evaluation import HeldoutReport, write_report
from lightning_ray.tracking import (
    Progress,
    RunSummary,
    TrackedRun,
    plot_learning_curve,
    write_summary,
)
from lightning_ray.training.conductor import Conductor
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.scores import metrics_of
from lightning_ray.training.selection import Samples
from lightning_ray.training.state import RunState


def score_heldout(
    scorer: Conductor, folder: RunFolder, tracked: TrackedRun, state: RunState
) -> dict[str, Any]:
    """The report of the present version on the held-out tasks."""
    report = scorer.evaluate()
    assert isinstance(report, HeldoutReport)
    tracked.log_metrics(metrics_of(report), state.step)
    if state.step:
        path = folder.path / "heldout.json"
        write_report(path, report)
        tracked.log_artifact(path)
    return asdict(report)


def leave_results(
    folder: RunFolder,
    tracked: TrackedRun,
    samples: Samples,
    state: RunState,
    policy: str,
    after: dict[str, Any] | None,
) -> None:
    """The learning curve and summary.json, in the folder and in MLflow."""
    history: list[dict[str, Any]] = [dict(row) for row in state.history]
    for step, report in ((0, state.heldout_before), (state.step, after)):
        if report is not None:
            history.append({"step": step, "heldout": _mean(report)})
    plot_learning_curve(history, folder.curve, title=folder.run_id, measures=("loss",))
    tracked.log_artifact(folder.curve)
    version = state.of(policy).version
    write_summary(
        folder.summary,
        RunSummary(
            heldout_before=_mean(state.heldout_before),
            heldout_after=_mean(after),
            steps=state.step,
            train_seconds=state.train_seconds,
            tokens_generated=0,
            mlflow_run_id=tracked.run_id,
            model_dir=str(folder.version(policy, version)),
            extra={
                "run_id": folder.run_id,
                "version": version,
                "heldout_before_report": state.heldout_before,
                "heldout_after_report": after,
                "history": state.history,
                "tokens_learnt": sum(row["sampled_tokens"] for row in state.history),
                **samples.facts(),
            },
        ),
    )
    tracked.log_artifact(folder.summary)


def say_results(
    progress: Progress,
    folder: RunFolder,
    state: RunState,
    policy: str,
    after: dict[str, Any] | None,
    ui: str,
    tracked: TrackedRun,
) -> None:
    """Tells the person at the terminal what came of the run, and where it lies."""
    say = progress.note
    before_mean, after_mean = _mean(state.heldout_before), _mean(after)
    losses = [row["loss"] for row in state.history if "loss" in row]
    if losses:
        say(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    if before_mean is not None and after_mean is not None:
        say(f"held-out score {before_mean:.3f} before, {after_mean:.3f} after")
    say(f"learning curve    {folder.curve}")
    say(f"tuned model       {folder.version(policy, state.of(policy).version)}")
    say(f"summary           {folder.summary}")
    fragment = tracked.url_fragment.lstrip("/")
    say(f"open it in MLflow: {ui}   then http://127.0.0.1:5000/{fragment}")


def _mean(report: dict[str, Any] | None) -> float | None:
    return None if report is None else report["measures"]["reward"]["mean"]
