"""lightning-ray optimize-prompt: a better system prompt for an agent that stays as it is.

    lightning-ray optimize-prompt experiment=calculator
    lightning-ray optimize-prompt experiment=calculator prompt=reflection \\
        prompt.reflection.base_url=https://HOST/v1 prompt.reflection.model=NAME \\
        prompt.reflection.api_key_env=KEY

Versions lie in MLflow's prompt registry; the alias `candidate` is on the best one that was better
on held-out tasks. Where APIs answer for every policy, no engine, torch or learner is started.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ray.agents import Task, check_agent
from lightning_ray.algorithms.demonstrations import Demonstrations
from lightning_ray.algorithms.prompt_config import Proposer
from lightning_ray.algorithms.prompt_search import Scored, SearchResult
from lightning_ray.algorithms.prompts import Candidate, PromptProposer
from lightning_ray.algorithms.reflection import Reflection
from lightning_ray.errors import InfrastructureError
from lightning_ray.evaluation import Interval
from lightning_ray.gateway import choose_port, upstream_answerer
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.jobs.running import running_parts
from lightning_ray.jobs.train import load_train_tasks, settle_paths
from lightning_ray.policies import PromptVersion
from lightning_ray.policies.models import resolve_model
from lightning_ray.policies.prompt_registry import PromptEntry, PromptRegistry, prompt_name
from lightning_ray.tracking import Progress, TrackedRun, ui_command, write_json
from lightning_ray.tracking.prompt_picture import plot_prompt_search
from lightning_ray.training import RunFolder
from lightning_ray.training.language_model import LanguageModel
from lightning_ray.training.prompt_job import (
    OptimizePromptConfig,
    check_optimize_prompt,
    split_tasks,
)
from lightning_ray.training.prompt_tuner import (
    HeldoutScore,
    PromptTuner,
    compare,
    report_of,
    rounds,
    write_candidates,
)

JOB_TAG = "lightning_ray.job"


def main(arguments: Sequence[str]) -> None:
    """Runs a prompt optimisation. Raises UserError for what the user can mend."""
    overrides = list(arguments)
    config = compose_config("optimize_prompt", OptimizePromptConfig, overrides)
    check_optimize_prompt(config)
    settle_paths(config.agent)
    tasks, heldout = load_train_tasks(config)
    split_tasks(len(tasks), config.prompt.validation)
    check_agent(config.agent, [*tasks, *heldout])
    choose_port(config.gateway)
    proposer = _proposer(config)
    models = {}
    for policy in config.policies.values():
        if policy.is_upstream:
            upstream_answerer(policy)
        else:
            models[policy.name] = resolve_model(policy.model)
    folder = RunFolder.create(Path(config.output_dir), f"{config.name}-prompt", overrides)
    # Not read where an API answers for the policy: then no engine starts.
    base = models.get(config.policy.name, folder.path)
    _run(config, folder, tasks, heldout, base, proposer)


def _proposer(config: OptimizePromptConfig) -> PromptProposer:
    """Who writes the prompts; a language model is asked whether it is there."""
    if config.prompt.proposer is Proposer.demonstrations:
        return Demonstrations(config.prompt.demonstrations, random.Random(config.seed))
    model = LanguageModel(config.prompt.reflection)
    model.knock()
    return Reflection(model)


def _run(
    config: OptimizePromptConfig,
    folder: RunFolder,
    tasks: list[Task],
    heldout: list[Task],
    base: Path,
    proposer: PromptProposer,
) -> None:
    progress = Progress(
        rounds(config),
        title=folder.run_id,
        mode=config.tracking.panel,
        rewards=("reward",),
        metrics=("best",),
    )
    with progress:
        progress.note(f"run {folder.run_id} in {folder.path}")
        tracked = TrackedRun.start(
            config.tracking, folder.path.parent, folder.run_id, tags={JOB_TAG: "optimize-prompt"}
        )
        folder.write_facts({"job": "optimize-prompt", "mlflow_run_id": tracked.run_id})
        tracked.log_config(resolved(config))
        registry = PromptRegistry(tracked.uri, prompt_name(config.policy.name, config.prompt.name))
        with running_parts(config, folder, base, progress, tracked) as parts:
            parts.start(base, 0, learn=False)
            tuner = PromptTuner(config, folder, parts, tracked, progress, tasks, heldout)
            tuner.rehearse()
            own = Candidate(tuner.seed)
            before = tuner.score(0, own)
            result = tuner.search(proposer)
            best = result.best
            if result.stopped_by and best.number == 0:
                raise InfrastructureError(result.stopped_by)
            if result.stopped_by:
                progress.note(f"the search ended early: {result.stopped_by}")
            after = before if best.number == 0 else tuner.score(best.number, best.candidate)
            entry = _register(config, tuner, tracked, registry, result, before, after)
            _leave(config, folder, tracked, tuner, result, entry, before, after)
            _say(folder, tracked, progress, best, entry, before, after)


def _register(
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


def _leave(
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


def _say(
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
