"""What a prompt optimisation leaves: versions in the registry, files, figures, and what it says.

Invariant: the alias `candidate` is set only on a prompt that was better than the agent's own on
held-out tasks, by the interval of their paired difference.
"""

from typing import Any

from lightning_ray.algorithms.prompt_search import Scored, SearchResult
from lightning_ray.evaluation import Interval
from lightning_ray.policies import PromptVersion
from lightning_ray.policies.prompt_registry import PromptEntry, PromptRegistry
from lightning_ray.tracking import Progress, TrackedRun, ui_command, write_json
from lightning_ray.tracking.prompt_picture import plot_prompt_search
from lightning_ray.training import RunFolder
from lightning_ray.training.prompt_job import OptimizePromptConfig
from lightning_ray.training.prompt_tuner import (
    HeldoutScore,
    PromptTuner,
    compare,
    report_of,
    write_candidates,
)


def register_prompts(
    config: OptimizePromptConfig,
    tuner: PromptTuner,
    tracked: TrackedRun,
    registry: PromptRegistry,
    result: SearchResult,
    before: HeldoutScore | None,
    after: HeldoutScore | None,
) -> PromptEntry:
    """Enters the agent's own prompt, what beat it, and the best; returns the best's entry."""
    own, best = result.scored[0], result.best
    kept = [one for one in result.scored if one.score > own.score or one in (own, best)]
    entries = {}
    for one in kept:
        tags: dict[str, str | int | float] = {
            "proposer": "agent" if one.parent is None else config.prompt.proposer.value,
            "score": one.score,
        }
        if one.parent is not None:
            tags["parent"] = one.parent
        version = tuner.version(one.number, one.candidate)
        entries[one.number] = registry.register(version, tracked.run_id, tags)
    for one, score in ((own, before), (best, after)):
        if score is not None:
            registry.tag(entries[one.number], {"heldout": _mean(score)})
    difference = compare(before, after)
    if difference is not None and best is not own:
        registry.tag(
            entries[best.number],
            {
                "heldout_difference": difference.mean,
                "heldout_difference_low": difference.low,
                "heldout_difference_high": difference.high,
            },
        )
        if difference.low > 0:
            registry.set_alias(entries[best.number])
    return registry.load(entries[best.number].uri)


def leave_results(
    config: OptimizePromptConfig,
    folder: RunFolder,
    tracked: TrackedRun,
    tuner: PromptTuner,
    result: SearchResult,
    entry: PromptEntry,
    before: HeldoutScore | None,
    after: HeldoutScore | None,
) -> None:
    """Pictures, texts and figures, in the run's folder and in MLflow."""
    picture, text = folder.path / "prompt_search.png", folder.path / "best_prompt.txt"
    candidates = folder.path / "candidates.jsonl"
    text.write_text(as_text(entry.prompt), encoding="utf-8")
    write_candidates(candidates, tuner.history)
    plot_prompt_search(
        tuner.history, picture, before=_mean(before), after=_mean(after), title=folder.run_id
    )
    difference = compare(before, after)
    write_json(
        folder.summary,
        {
            "run_id": folder.run_id,
            "mlflow_run_id": tracked.run_id,
            "policy": config.policy.name,
            "proposer": config.prompt.proposer.value,
            "heldout_before": _mean(before),
            "heldout_after": _mean(after),
            "heldout_difference": None if difference is None else vars(difference),
            "better": _better(difference, result.best),
            "prompt": entry.uri,
            "version": result.best.number,
            "validation": {str(one.number): one.score for one in result.scored},
            "rollouts": result.spent,
            "candidates": len({row["version"] for row in tuner.history}),
            "cost_usd": tuner.cost_usd,
            "stopped_by": result.stopped_by,
            "heldout_before_report": report_of(before),
            "heldout_after_report": report_of(after),
        },
    )
    figures = {"rollouts": float(result.spent), "cost_usd": tuner.cost_usd}
    for name, score in (("heldout_before", before), ("heldout_after", after)):
        if score is not None:
            figures[name] = _mean(score) or 0.0
    if difference is not None:
        figures["heldout_difference"] = difference.mean
    tracked.log_metrics(figures, result.spent)
    for path in (picture, text, candidates, folder.summary):
        tracked.log_artifact(path)


def say_results(
    folder: RunFolder,
    tracked: TrackedRun,
    progress: Progress,
    best: Scored,
    entry: PromptEntry,
    before: HeldoutScore | None,
    after: HeldoutScore | None,
) -> None:
    """What came of it, where it lies, and how to use it."""
    say = progress.note
    difference = compare(before, after)
    if best.number == 0:
        say("no prompt scored better than the agent's own on the validation tasks")
    elif difference is None:
        say("no held-out tasks (evaluation.tasks): the best prompt was not compared, no alias set")
    else:
        say(
            f"held-out score {_mean(before):.3f} before, {_mean(after):.3f} after: "
            f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        )
        if difference.low <= 0:
            say("that may be chance: the alias `candidate` was not set; try more held-out tasks")
    name = entry.uri if not entry.aliases else f"{entry.uri}, alias {', '.join(entry.aliases)}"
    say(f"best prompt       {name}")
    say(f"as text           {folder.path / 'best_prompt.txt'}")
    say(f"summary           {folder.summary}")
    if best.number:
        say(f"in your own code: mlflow.genai.load_prompt({entry.uri!r}).template, with")
        say(f"                  mlflow.set_registry_uri({tracked.uri!r})")
    say(
        f"open it in MLflow: {ui_command(tracked.uri)}   then "
        f"http://127.0.0.1:5000/{tracked.url_fragment.lstrip('/')}"
    )


def as_text(prompt: PromptVersion) -> str:
    """A prompt as a person reads it: the system text, then the demonstrations as turns."""
    turns = [("system", prompt.text)]
    for user, assistant in prompt.demonstrations:
        turns += [("user", user), ("assistant", assistant)]
    return "\n".join(f"[{role}]\n{text}\n" for role, text in turns)


def _better(difference: Interval | None, best: Scored) -> bool:
    return best.number > 0 and difference is not None and difference.low > 0


def _mean(score: HeldoutScore | None) -> Any:
    """The mean held-out reward; None where nothing was measured."""
    return None if score is None else score.report.measures["reward"].mean
