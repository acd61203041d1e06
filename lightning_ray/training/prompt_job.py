"""The configuration of a prompt optimisation: a training job's, whose weights all stay, and more.

Invariant: after `check_optimize_prompt` no policy is to be trained.
"""

from dataclasses import dataclass, field, replace

from lightning_ray.algorithms.prompt_config import PromptConfig, check_prompt
from lightning_ray.errors import UserError
from lightning_ray.policies import choose_policy
from lightning_ray.policies.prompt_registry import prompt_name
from lightning_ray.training.config import TrainConfig, check_rooms


@dataclass
class OptimizePromptConfig(TrainConfig):
    """An experiment made for `train` serves: its training tasks are what prompts are tried on."""

    prompt: PromptConfig = field(default_factory=PromptConfig)


def check_optimize_prompt(config: OptimizePromptConfig) -> None:
    """Checks every value that can be checked without loading anything. Raises UserError.

    Afterwards `config.policy` is the policy whose prompt is optimised, and `config.policies` holds
    every one, all frozen.
    """
    learning = [name for name, policy in config.policies.items() if policy.train]
    config.policy, others = choose_policy(config.policy, config.policies, config.prompt.policy)
    if len(learning) == 1:
        # A role that names no policy is the trained one's, whoever's prompt is optimised.
        for role in config.gateway.roles.values():
            role.policy = role.policy or learning[0]
    config.policy = replace(config.policy, train=False)
    config.policies = {config.policy.name: config.policy, **others}
    check_rooms(config)
    check_prompt(config.prompt)
    prompt_name(config.policy.name, config.prompt.name)


def split_tasks(count: int, validation: int) -> int:
    """How many of `count` training tasks validate, at most half. Raises UserError for too few."""
    if count < 2:
        raise UserError(
            "training.tasks holds one task: prompts are compared on some and scored on others, so "
            "at least 2 are needed"
        )
    return min(validation, count // 2)
