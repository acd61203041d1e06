"""lightning-ray evaluate run=... | experiment=...: versions run on held-out tasks.

The engines start with the version that is asked about; with `against`, they take on the other one's
weights and run the same tasks again.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ray.agents import Task, check_agent, load_tasks
from lightning_ray.errors import UserError
from lightning_ray.evaluation import GateConfig, Side, check_gate, evaluate
from lightning_ray.gateway import choose_port, upstream_answerer
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.jobs.evaluate_results import JOB, JOB_TAG, end_by_gates, leave_results
from lightning_ray.jobs.session import session
from lightning_ray.jobs.train import settle_paths
from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.policies.models import resolve_model
from lightning_ray.policies.registry import Weights
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Parts, RunFolder, TrainConfig, check_train
from lightning_ray.training.rehearsal import why
from lightning_ray.training.rolling import (
    came_to_reward,
    note_failures,
    outcomes_of,
    rollout_specs,
    run_rollouts,
)

# What must be equal for engines to take on other weights without a restart.
_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass
class EvaluateConfig(TrainConfig):
    """A training job's configuration, and gates."""

    gate: GateConfig = field(default_factory=GateConfig)


@dataclass(frozen=True)
class Version:
    """Weights to run the tasks on."""

    label: str
    number: int
    path: Path


def evaluate_version(words: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Runs the evaluation. Raises UserError, and SystemExit(3) for gates."""
    if "run" in words:
        config, subject, against = _of_run(words, overrides)
    else:
        config, subject, against = _of_models(words, overrides)
    check_gate(config.gate, against is not None)
    if config.evaluation.tasks is None:
        raise UserError("evaluation.tasks: no held-out tasks to run; evaluation.tasks=FILE.jsonl")
    if against is not None:
        _check_shapes(subject, against)
    settle_paths(config.agent)
    tasks = load_tasks(config.evaluation.tasks)
    check_agent(config.agent, tasks)
    choose_port(config.gateway)
    for policy in config.policies.values():
        if policy.is_upstream:
            upstream_answerer(policy)
        elif not policy.train:
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
        with session(config, parts, tracked, progress, "the same command again"):
            parts.start(subject.path, subject.number, learn=False)
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
    specs = rollout_specs(f"v{version.number:05d}", secrets.token_hex(3), tasks, samples, config)
    with progress.phase(f"scoring {version.label}", slow=True):
        records = run_rollouts(parts.queue, specs, config.rollouts.batch_timeout_s, progress)
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


def _of_run(
    words: Mapping[str, str], overrides: Sequence[str]
) -> tuple[EvaluateConfig, Version, Version | None]:
    """What a run was configured with, and the versions of it that are asked about."""
    roots = [o.removeprefix("output_dir=") for o in overrides if o.startswith("output_dir=")]
    folder = RunFolder.find(Path(roots[-1] if roots else "outputs"), words["run"], "run")
    config = compose_config("train", EvaluateConfig, [*folder.overrides(), *overrides])
    # Settles which policy is the trained one.
    check_train(config)
    # Beside the run, wherever the command is typed.
    config.output_dir = str(folder.path.parent)
    mlflow_run = folder.facts().get("mlflow_run_id")
    uri = config.tracking.uri or default_uri(folder.path.parent)
    registered: list[PolicyVersion] = []
    if mlflow_run is not None:
        registered = PolicyRegistry(uri, config.policy.name, mlflow_run).versions()
    if not registered:
        raise UserError(f"run={words['run']}: it has no version; it stopped before its first step")
    usable = [version for version in registered if _usable(version)]
    newest = str(usable[-1].number) if usable else str(registered[-1].number)
    subject = _version_of(folder, registered, "version", words.get("version", newest))
    against = None
    if "against" in words:
        against = _version_of(folder, registered, "against", words["against"])
        if against.number == subject.number:
            raise UserError(
                f"against={against.number}: version {against.number} against itself; name another"
            )
    return config, subject, against


def _version_of(
    folder: RunFolder, registered: Sequence[PolicyVersion], key: str, word: str
) -> Version:
    usable = ", ".join(str(version.number) for version in registered if _usable(version))
    found = [version for version in registered if str(version.number) == word]
    if not found:
        raise UserError(
            f"{key}={word}: run {folder.run_id} has no such version; "
            f"versions with weights: {usable or 'none'}"
        )
    version = found[0]
    if version.kind != "weights":
        raise UserError(f"{key}={word}: version {word} is a {version.kind}, not weights")
    if not _usable(version):
        why = (
            "its weights were removed by retention (policy.keep_versions)"
            if version.weights is Weights.REMOVED
            else f"its weights are not at {version.path} any more"
        )
        raise UserError(f"{key}={word}: {why}; versions with weights: {usable or 'none'}")
    path = resolve_model(str(version.path))
    return Version(f"{folder.run_id} version {version.number}", version.number, path)


def _usable(version: PolicyVersion) -> bool:
    return version.weights is Weights.PRESENT and version.path.is_dir()


def _of_models(
    words: Mapping[str, str], overrides: Sequence[str]
) -> tuple[EvaluateConfig, Version, Version | None]:
    """An experiment's model, and another one to compare it with."""
    if "version" in words:
        raise UserError(f"version={words['version']}: of which run? add run=RUN")
    config = compose_config("train", EvaluateConfig, overrides)
    check_train(config)
    model = config.policy.model
    subject = Version(model, 0, resolve_model(model))
    if (name := words.get("against")) is None:
        return config, subject, None
    try:
        path = resolve_model(name)
    except UserError as error:
        raise UserError(
            f"against={name}: {str(error).removeprefix(f'policy.model={name}: ')}"
        ) from error
    if path == subject.path:
        raise UserError(f"against={name}: the same model as policy.model; name another")
    return config, subject, Version(name, 1, path)


def _check_shapes(subject: Version, against: Version) -> None:
    """Engines take on weights of the shape they have. Raises UserError for others."""
    ours, theirs = (
        json.loads((version.path / "config.json").read_text()) for version in (subject, against)
    )
    for key in _SHAPE:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"against: {key} is {theirs.get(key)} in {against.label} and {ours.get(key)} in "
                f"{subject.label}; evaluate each, then compare with spans=RUN against=RUN"
            )


def _about(
    words: Mapping[str, str],
    config: EvaluateConfig,
    subject: Version,
    against: Version | None,
    tasks: int,
) -> dict[str, Any]:
    about = {
        "run": words.get("run"),
        "policy": config.policy.name,
        "version": subject.number if "run" in words else None,
        "model": str(subject.path),
        "against_version": against.number if against and "run" in words else None,
        "against_model": str(against.path) if against else None,
        "agent": config.agent.name,
        "tasks_file": config.evaluation.tasks,
        "tasks": tasks,
        "samples_per_task": config.evaluation.samples_per_task,
    }
    return {key: value for key, value in about.items() if value is not None}
