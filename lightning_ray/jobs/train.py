"""lightning-ray train: train an agent that never heard of us.

    lightning-ray train experiment=calculator
    lightning-ray train experiment=calculator algorithm.group_size=4 training.steps=10
    lightning-ray train resume=RUN            # go on from the last checkpoint
    lightning-ray train --multirun experiment=calculator seed=0,1,2   # a sweep, see jobs/sweep.py

The run's folder holds everything: spans, versions, checkpoints, the curve, summary.json.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_ray.agents import AgentConfig, Task, check_agent, load_tasks
from lightning_ray.errors import UserError
from lightning_ray.evaluation import (
    GateConfig,
    evaluate,
    write_evaluation,
    write_report,
)
from lightning_ray.gateway import choose_port, upstream_answerer
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.jobs.session import session
from lightning_ray.jobs.sweep import is_multirun, sweep
from lightning_ray.learner import check_model_dir
from lightning_ray.policies.models import resolve_model
from lightning_ray.rollouts import check_task_policies
from lightning_ray.tracking import (
    Progress,
    RunSummary,
    TrackedRun,
    plot_learning_curve,
    ui_command,
    write_summary,
)
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Conductor, Parts, RunFolder, TrainConfig, check_train
from lightning_ray.training.checkpoints import Checkpoints
from lightning_ray.training.config import trained_policies
from lightning_ray.training.hygiene_log import totals
from lightning_ray.training.scores import metrics_of
from lightning_ray.training.step_metrics import shown_metrics
from lightning_ray.trajectories import HygienePolicy, task_key


def main(arguments: Sequence[str]) -> None:
    """Runs or resumes a training job or a sweep. Raises UserError for what the user can mend."""
    if is_multirun(arguments):
        sweep("train", arguments, _check_child)
        return
    config, folder, overrides = _configure(arguments)
    tasks, heldout, base = _check(config)
    resuming = folder is not None
    if folder is None:
        folder = RunFolder.create(Path(config.output_dir), config.name, overrides)
    _train(config, folder, tasks, heldout, base, resuming)


def _check(config: TrainConfig) -> tuple[list[Task], list[Task], Path]:
    """All that can be wrong, before anything starts; the tasks, the held-out tasks, the model."""
    check_train(config)
    settle_paths(config.agent)
    tasks, heldout = load_train_tasks(config)
    check_agent(config.agent, [*tasks, *heldout])
    choose_port(config.gateway)
    base = resolve_model(config.policy.model)
    for policy in config.policies.values():
        if policy.is_upstream:
            upstream_answerer(policy)
        else:
            folder = resolve_model(policy.model)
            if policy.train:
                check_model_dir(folder)
    return tasks, heldout, base


def _check_child(overrides: Sequence[str]) -> TrainConfig:
    """The checked configuration of a sweep's child."""
    config = compose_config("train", TrainConfig, overrides)
    _check(config)
    return config


def check(arguments: Sequence[str]) -> None:
    """What can be told of a job that will run elsewhere, from a folder like this one.

    Raises UserError for what the user can mend.
    """
    if any(argument.startswith("resume=") for argument in arguments):
        # The run, and what was typed for it, lie over there.
        return
    config: TrainConfig = compose_config("train", TrainConfig, arguments)
    check_train(config)
    for path in (config.training.tasks, config.evaluation.tasks):
        if path is not None and not Path(path).is_absolute():
            load_tasks(path)


def _train(
    config: TrainConfig,
    folder: RunFolder,
    tasks: list[Task],
    heldout: list[Task],
    base: Path,
    resuming: bool,
) -> None:
    facts = folder.facts()
    root = folder.path.parent
    checkpoint = folder.last_checkpoint() if resuming else None
    progress = Progress(
        config.training.steps,
        title=folder.run_id,
        mode=config.tracking.panel,
        metrics=shown_metrics([policy.name for policy in trained_policies(config)]),
        first_step=0 if checkpoint is None else Checkpoints.peek(checkpoint).step,
    )
    with progress:
        progress.note(f"run {folder.run_id} in {folder.path}")
        tracked = TrackedRun.start(
            config.tracking,
            root,
            folder.run_id,
            resume=facts.get("mlflow_run_id"),
            tags=facts.get("tags"),
        )
        folder.write_facts({**facts, "mlflow_run_id": tracked.run_id, "base_model": str(base)})
        tracked.log_config(resolved(config))
        uri = config.tracking.uri or default_uri(root)
        parts = Parts(config, folder, base, progress)
        again = f"lightning-ray train resume={folder.run_id}"
        conductor = Conductor(config, folder, parts, tracked, uri, progress, tasks, heldout)
        if checkpoint is not None:
            Checkpoints.require(checkpoint, conductor.trained)
        with session(config, parts, tracked, progress, again):
            _start(parts, conductor, folder, checkpoint)
            _run(conductor, config, folder, parts, tracked, uri)


def _start(parts: Parts, conductor: Conductor, folder: RunFolder, checkpoint: Path | None) -> None:
    """Starts the parts at the base models, or where the checkpoint left off."""
    if checkpoint is None:
        parts.start()
        return
    numbers = {n: state.version for n, state in Checkpoints.peek(checkpoint).policies.items()}
    versions = {n: (folder.version(n, number), number) for n, number in numbers.items() if number}
    parts.start(versions, learners_later=True)
    conductor.resume(checkpoint)


def _run(
    conductor: Conductor,
    config: TrainConfig,
    folder: RunFolder,
    parts: Parts,
    tracked: TrackedRun,
    uri: str,
) -> None:
    """Score, train, score again, and leave the results."""
    state = conductor.state
    frozen = conductor.frozen_weights()
    if state.step == 0:
        conductor.rehearse()
    if state.step == 0 and (before := conductor.evaluate()) is not None:
        state.heldout_before = asdict(before)
        tracked.log_metrics(metrics_of(before), 0)
    conductor.train()
    # Another object where the run went back to a checkpoint.
    state = conductor.state
    after = conductor.evaluate()
    if after is not None:
        tracked.log_metrics(metrics_of(after), state.step)
        write_report(folder.path / "heldout.json", after)
        tracked.log_artifact(folder.path / "heldout.json")
    models = {
        name: folder.version(name, number) if number else parts.base(name)
        for name, number in conductor.versions.items()
    }
    before_mean = _mean(state.heldout_before)
    after_mean = None if after is None else after.measures["reward"].mean
    _leave_pictures(conductor, folder, tracked, before_mean, after_mean)
    write_summary(
        folder.summary,
        RunSummary(
            heldout_before=before_mean,
            heldout_after=after_mean,
            steps=state.step,
            train_seconds=state.train_seconds,
            tokens_generated=state.tokens_generated,
            mlflow_run_id=tracked.run_id,
            model_dir=str(models[config.policy.name]),
            extra={
                "run_id": folder.run_id,
                "version": conductor.versions[config.policy.name],
                # Of every policy that learns.
                "versions": conductor.versions,
                "models": {name: str(model) for name, model in models.items()},
                "heldout_before_report": state.heldout_before,
                "heldout_after_report": None if after is None else asdict(after),
                "rollouts_left_out": state.left_out,
                "hygiene": totals(state.history),
                "history": state.history,
                # Digests of the frozen policies' weights in use, before and after.
                "frozen_before": frozen,
                "frozen_after": conductor.frozen_weights(),
            },
        ),
    )
    tracked.log_artifact(folder.summary)
    if after is not None:
        _leave_measures(conductor, config, folder, tracked)
    if folder.hygiene.is_file():
        tracked.log_artifact(folder.hygiene)
    conductor.say_results(before_mean, after_mean, models, ui_command(uri), tracked.url_fragment)


def _leave_measures(
    conductor: Conductor, config: TrainConfig, folder: RunFolder, tracked: TrackedRun
) -> None:
    """The operator's measures of the last version, against the first where this process saw it."""
    subject = conductor.scored[-1]
    against = conductor.scored[0] if len(conductor.scored) > 1 else None
    evaluation = evaluate(subject, against, config.evaluation, GateConfig())
    about = {"run": folder.run_id, "versions": conductor.versions}
    for path in write_evaluation(
        folder.path, evaluation, subject, against, config.evaluation, about
    ):
        tracked.log_artifact(path)


def _leave_pictures(
    conductor: Conductor,
    folder: RunFolder,
    tracked: TrackedRun,
    before: float | None,
    after: float | None,
) -> None:
    history: list[dict[str, Any]] = [dict(row) for row in conductor.state.history]
    if before is not None:
        history.insert(0, {"step": 0, "heldout": before})
    if after is not None:
        history.append({"step": conductor.state.step, "heldout": after})
    plot_learning_curve(history, folder.curve, title=folder.run_id)
    tracked.log_artifact(folder.curve)
    for page in map(folder.trajectories, conductor.trained):
        if page.is_file():
            tracked.log_artifact(page)


def _configure(arguments: Sequence[str]) -> tuple[TrainConfig, RunFolder | None, list[str]]:
    """The job's configuration, and the folder of the run to resume if one is named."""
    resume = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    overrides = [a for a in arguments if not a.startswith("resume=")]
    if not resume:
        return compose_config("train", TrainConfig, overrides), None, overrides
    roots = [a.removeprefix("output_dir=") for a in overrides if a.startswith("output_dir=")]
    folder = RunFolder.find(Path(roots[-1] if roots else TrainConfig.output_dir), resume[-1])
    overrides = folder.overrides() + overrides
    config = compose_config("train", TrainConfig, overrides)
    # The run stays where it lies, wherever the command is typed.
    config.output_dir = str(folder.path.parent)
    return config, folder, overrides


def settle_paths(agent: AgentConfig) -> None:
    """Makes the agent's paths absolute: workers run in folders of their own."""
    agent.cwd = str(Path(agent.cwd or ".").absolute())
    file, colon, function = agent.grader.rpartition(":")
    if colon and file.endswith(".py"):
        agent.grader = f"{Path(file).absolute()}:{function}"


def load_train_tasks(config: TrainConfig) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks. Raises UserError when a held-out task is trained on.

    With another `hygiene.leakage` than stop it is for the checks of its step to see to that.
    """
    tasks = load_tasks(config.training.tasks)
    check_task_policies(config.rollouts, ((task.id, task.data) for task in tasks))
    if config.evaluation.tasks is None:
        return tasks, []
    heldout = load_tasks(config.evaluation.tasks)
    check_task_policies(config.rollouts, ((task.id, task.data) for task in heldout))
    if config.hygiene.leakage is not HygienePolicy.stop:
        return tasks, heldout
    trained = {task_key(task.data): task.id for task in tasks}
    for task in heldout:
        if (other := trained.get(task_key(task.data))) is not None:
            raise UserError(
                f"held-out task {task.id} of {config.evaluation.tasks} is training task {other} of "
                f"{config.training.tasks}; take it out of one of them, or leave its rollouts out "
                "with hygiene.leakage=drop"
            )
    return tasks, heldout


def _mean(report: dict[str, Any] | None) -> float | None:
    return None if report is None else report["measures"]["reward"]["mean"]
