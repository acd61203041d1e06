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

from lightning_ray.agents import Task, check_agent
from lightning_ray.algorithms.demonstrations import Demonstrations
from lightning_ray.algorithms.prompt_config import Proposer
from lightning_ray.algorithms.prompts import Candidate, PromptProposer
from lightning_ray.algorithms.reflection import Reflection
from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway import choose_port, upstream_answerer
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.jobs.prompt_results import leave_results, register_prompts, say_results
from lightning_ray.jobs.session import session
from lightning_ray.jobs.train import load_train_tasks, settle_paths
from lightning_ray.policies.models import resolve_model
from lightning_ray.policies.prompt_registry import PromptRegistry, prompt_name
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Parts, RunFolder
from lightning_ray.training.language_model import LanguageModel
from lightning_ray.training.prompt_job import (
    OptimizePromptConfig,
    check_optimize_prompt,
    split_tasks,
)
from lightning_ray.training.prompt_tuner import PromptTuner, rounds

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
    root = Path(config.output_dir)
    name = prompt_name(config.policy.name, config.prompt.name)
    registry = PromptRegistry(config.tracking.uri or default_uri(root), name)
    folder = RunFolder.create(root, f"{config.name}-prompt", overrides)
    # Not read where an API answers for the policy: then no engine starts.
    base = models.get(config.policy.name, folder.path)
    _run(config, folder, tasks, heldout, base, proposer, registry)


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
    registry: PromptRegistry,
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
        parts = Parts(config, folder, base, progress)
        with session(config, parts, tracked, progress, learn=False):
            parts.start(learn=False)
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
            entry = register_prompts(config, tuner, tracked, registry, result, before, after)
            leave_results(config, folder, tracked, tuner, result, entry, before, after)
            say_results(folder, tracked, progress, best, entry, before, after)
