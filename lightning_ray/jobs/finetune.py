"""lightning-ray finetune: supervised tuning on spans of earlier runs, chosen by reward or by SQL.

    lightning-ray finetune from=RUN min_reward=1.0 experiment=calculator
    lightning-ray finetune from=RUN,RUN where="reward >= 1 and calls <= 3" finetuning.epochs=2
    lightning-ray finetune from=RUN sql="SELECT attempt_id FROM spans WHERE ..."
    lightning-ray finetune resume=RUN         # go on from the last checkpoint

With held-out tasks (evaluation.tasks) the model is scored before and after.
"""

from collections.abc import Sequence
from pathlib import Path

from lightning_ray.agents import Task, check_agent, load_tasks
from lightning_ray.errors import UserError
from lightning_ray.gateway import choose_port
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.jobs.session import session
from lightning_ray.jobs.train import settle_paths
from lightning_ray.learner import check_model_dir
from lightning_ray.policies import PolicyRegistry
from lightning_ray.policies.models import resolve_model
from lightning_ray.tracking import Progress, TrackedRun, ui_command
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Conductor, Parts, RunFolder, RunState
from lightning_ray.training.checkpoints import Checkpoints
from lightning_ray.training.finetuning import FinetuneConfig, check_finetune
from lightning_ray.training.selection import Samples, choose_samples
from lightning_ray.training.tuned import leave_results, say_results, score_heldout
from lightning_ray.training.tuner import Tuner, sample_order
from lightning_ray.training.versions import Versions

WORDS = ("from", "min_reward", "where", "sql")
"""Typed as they are: SQL has characters that mean something else to Hydra."""


def main(arguments: Sequence[str]) -> None:
    """Runs or resumes a job. Raises UserError for what the user can mend."""
    config, folder, typed = _configure(arguments)
    check_finetune(config)
    heldout: list[Task] = []
    if config.evaluation.tasks is not None:
        heldout = load_tasks(config.evaluation.tasks)
        settle_paths(config.agent)
        check_agent(config.agent, heldout)
        choose_port(config.gateway)
    base = resolve_model(config.policy.model)
    check_model_dir(base)
    samples = choose_samples(config, base, heldout)
    if folder is None:
        folder = RunFolder.create(Path(config.output_dir), _name(config.name), typed)
    elif folder.facts().get("digest", samples.digest) != samples.digest:
        raise UserError(
            f"resume={folder.run_id}: its choice now gives other samples than when it was begun; "
            "start anew"
        )
    _finetune(config, folder, samples, heldout, base)


def _finetune(
    config: FinetuneConfig, folder: RunFolder, samples: Samples, heldout: list[Task], base: Path
) -> None:
    facts = folder.facts()
    root = folder.path.parent
    checkpoint = folder.last_checkpoint()
    state = RunState() if checkpoint is None else Checkpoints.peek(checkpoint)
    progress = Progress(
        config.finetuning.epochs * sample_order(config, samples).steps_per_epoch,
        title=folder.run_id,
        mode=config.tracking.panel,
        rewards=("loss",),
        metrics=("tokens_per_second", "version"),
        first_step=state.step,
    )
    with progress:
        progress.note(f"run {folder.run_id} in {folder.path}")
        for line in samples.lines():
            progress.note(line)
        tracked = TrackedRun.start(
            config.tracking,
            root,
            folder.run_id,
            resume=facts.get("mlflow_run_id"),
            tags={"lightning_ray.job": "finetune", "lightning_ray.from": ",".join(samples.runs)},
        )
        folder.write_facts(
            {"mlflow_run_id": tracked.run_id, "base_model": str(base), **samples.facts()}
        )
        tracked.log_config(resolved(config))
        uri = config.tracking.uri or default_uri(root)
        policy = config.policy.name
        checkpoints = Checkpoints(folder, config.training.keep_checkpoints)
        registry = PolicyRegistry(uri, policy, tracked.run_id)
        versions = Versions(config.policy, folder, registry)
        parts = Parts(config, folder, base, progress)
        tuner = Tuner(config, folder, versions, tracked, progress, samples, base)
        with session(
            config, parts, tracked, progress, f"lightning-ray finetune resume={folder.run_id}"
        ):
            scorer = None
            if heldout:
                version = state.of(policy).version
                parts.start({policy: (folder.version(policy, version), version)} if version else {})
                scorer = Conductor(config, folder, parts, tracked, uri, progress, [], heldout)
                scorer.state = state
            else:
                parts.start_learners()
            if checkpoint is not None:
                checkpoints.load(checkpoint, parts.learners)
            if scorer is not None and state.step == 0:
                state.heldout_before = score_heldout(scorer, folder, tracked, state)
            take_on = None if scorer is None else parts.engines.update_weights
            tuner.train(parts.learners[policy], state, take_on)
            after = None if scorer is None else score_heldout(scorer, folder, tracked, state)
            leave_results(folder, tracked, samples, state, policy, after)
            say_results(progress, folder, state, policy, after, ui_command(uri), tracked)


def _configure(
    arguments: Sequence[str],
) -> tuple[FinetuneConfig, RunFolder | None, list[str]]:
    """The configuration, the folder of the run to resume if one is named, and what was typed."""
    resume = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    typed = [a for a in arguments if not a.startswith("resume=")]
    if not resume:
        return _compose(typed), None, typed
    output_dir = Path(_compose(typed).output_dir)
    folder = RunFolder.find(output_dir, resume[-1])
    typed = folder.overrides() + typed
    config = _compose(typed)
    # The run stays where it lies, wherever the command is typed.
    config.output_dir = str(folder.path.parent)
    return config, folder, typed


def _compose(typed: Sequence[str]) -> FinetuneConfig:
    """Hydra's part of what was typed, and the words that are not for it."""
    words: dict[str, str] = {}
    overrides = []
    for argument in typed:
        word, equals, value = argument.partition("=")
        if equals and word in WORDS:
            words[word] = value
        else:
            overrides.append(argument)
    config: FinetuneConfig = compose_config("finetune", FinetuneConfig, overrides)
    if "from" in words:
        config.samples.runs = [run.strip() for run in words["from"].split(",") if run.strip()]
    if "min_reward" in words:
        try:
            config.samples.min_reward = float(words["min_reward"])
        except ValueError as error:
            raise UserError(f"min_reward={words['min_reward']}: must be a number") from error
    config.samples.where = words.get("where", config.samples.where)
    config.samples.sql = words.get("sql", config.samples.sql)
    return config


def _name(name: str) -> str:
    return name if name.endswith("finetune") else f"{name}-finetune"
