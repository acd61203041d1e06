"""lightning-ray evaluate run=... | experiment=...: versions run on held-out tasks.

The engines start with the version that is asked about; with `against`, they take on the other one's
weights and run the same tasks again.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ray.agents import Task, check_agent, load_tasks
from lightning_ray.errors import UserError
from lightning_ray.evaluation import GateConfig, Side, check_gate, evaluate
from lightning_ray.gateway import choose_port, upstream_answerer
from lightning_ray.jobs.compose import resolved
from lightning_ray.jobs.evaluate_choice import (
    EvaluateConfig,
    Version,
    check_shapes,
    versions_of_models,
    versions_of_run,
)
from lightning_ray.jobs.evaluate_results import JOB, JOB_TAG, end_by_gates, leave_results
from lightning_ray.jobs.session import session
from lightning_ray.jobs.train import settle_paths
from lightning_ray.policies.models import resolve_model
from lightning_ray.rollouts import check_task_policies
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.training import Parts, RunFolder
from lightning_ray.training.rehearsal import why
from lightning_ray.training.rolling import (
    came_to_reward,
    note_failures,
    outcomes_of,
    rollout_specs,
    run_rollouts,
)


def evaluate_version(words: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Runs the evaluation. Raises UserError, and SystemExit(3) for gates."""
    if "run" in words:
        config, subject, against = versions_of_run(words, overrides)
    else:
        config, subject, against = versions_of_models(words, overrides)
    check_gate(config.gate, against is not None)
    if config.evaluation.tasks is None:
        raise UserError("evaluation.tasks: no held-out tasks to run; evaluation.tasks=FILE.jsonl")
    if against is not None:
        check_shapes(subject, against)
    settle_paths(config.agent)
    tasks = load_tasks(config.evaluation.tasks)
    check_task_policies(config.rollouts, ((task.id, task.data) for task in tasks))
    check_agent(config.agent, tasks)
    choose_port(config.gateway)
    for policy in config.policies.values():
        if policy.is_upstream:
            upstream_answerer(policy)
        elif policy.name != config.policy.name and policy.name not in subject.others:
            resolve_model(policy.model)
    folder = RunFolder.create(Path(config.output_dir), f"{config.name}-evaluate", overrides)
    folder.write_facts({"job": JOB})
    about = _about(words, config, subject, against, len(tasks))
    _run(config, folder, tasks, subject, against, about)


def _run(
    config: EvaluateConfig,
    folder: RunFolder,
    tasks: Sequence[Task],
    subject: Version,
    against: Version | None,
    about: Mapping[str, Any],
) -> None:
    versions = [subject] + ([] if against is None else [against])
    progress = Progress(
        len(versions),
        title=folder.run_id,
        mode=config.tracking.panel,
        rewards=(config.evaluation.reward,),
        metrics=("version",),
    )
    with progress:
        progress.note(f"evaluation {folder.run_id} in {folder.path}")
        root = folder.path.parent
        tracked = TrackedRun.start(config.tracking, root, folder.run_id, tags={JOB_TAG: JOB})
        folder.write_facts({"job": JOB, "mlflow_run_id": tracked.run_id})
        tracked.log_config(resolved(config) | {"about": dict(about)})
        parts = Parts(config, folder, subject.path, progress)
        with session(config, parts, tracked, progress, "the same command again", learn=False):
            asked = {config.policy.name: (subject.path, subject.number)}
            parts.start({**subject.others, **asked}, learn=False)
            sides = []
            for place, version in enumerate(versions):
                if place:
                    with progress.phase(f"weights of {version.label}", slow=True):
                        parts.engines.update_weights(str(version.path), version.number)
                sides.append(_score(parts, config, tasks, version, place + 1, progress))
            other = None if against is None else sides[1]
            evaluation = evaluate(sides[0], other, config.evaluation, config.gate)
            leave_results(
                folder.path,
                evaluation,
                sides[0],
                other,
                config.evaluation,
                about,
                tracked,
                progress.note,
            )
    end_by_gates(evaluation)


def _score(
    parts: Parts,
    config: EvaluateConfig,
    tasks: Sequence[Task],
    version: Version,
    step: int,
    progress: Progress,
) -> Side:
    """Runs every task on the version that the engines have, and reads what came of it."""
    samples = config.evaluation.samples_per_task
    prefix = f"v{version.number:05d}"
    specs = rollout_specs(prefix, secrets.token_hex(3), tasks, samples, config, heldout=True)
    with progress.phase(f"scoring {version.label}", slow=True):
        limit = config.rollouts.batch_timeout_s
        records = run_rollouts(parts.queue, specs, limit, progress, parts.mend)
    note_failures(records, progress)
    if not any(came_to_reward(record) for record in records):
        raise UserError(f"no rollout came to a reward; the first: {why(records[0])}")
    side = Side(version.label, outcomes_of(records, parts.store, config.evaluation))
    quality = evaluate(side, None, config.evaluation, GateConfig()).subject.measures[0].interval
    metrics = {"version": float(version.number)}
    if quality is not None:
        metrics[config.evaluation.reward] = quality.mean
    progress.step_done(step, metrics)
    return side


def _about(
    words: Mapping[str, str],
    config: EvaluateConfig,
    subject: Version,
    against: Version | None,
    tasks: int,
) -> dict[str, Any]:
    about = {
        "run": Path(words["run"]).name if "run" in words else None,
        "policy": config.policy.name,
        "version": subject.number if "run" in words else None,
        "others": {name: number for name, (_, number) in subject.others.items()} or None,
        "model": str(subject.path),
        "against_version": against.number if against and "run" in words else None,
        "against_model": str(against.path) if against else None,
        "agent": config.agent.name,
        "tasks_file": config.evaluation.tasks,
        "tasks": tasks,
        "samples_per_task": config.evaluation.samples_per_task,
    }
    return {key: value for key, value in about.items() if value is not None}
