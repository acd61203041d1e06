"""What a policy learns by: the run's algorithm, credit and learner, or settings of its own."""

from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_ray.algorithms import Algorithm, AlgorithmConfig, make_algorithm, own_loss
from lightning_ray.errors import UserError
from lightning_ray.learner import LearnerConfig, check_learner
from lightning_ray.policies import PolicyConfig
from lightning_ray.trajectories import CreditConfig, check_credit

OF_THE_RUN = ("group_size", "extra_rounds")
"""Settings of an algorithm that say which rollouts there are: all policies learn from the same."""


@dataclass(frozen=True)
class Own:
    """The settings that one policy learns by."""

    algorithm: AlgorithmConfig
    credit: CreditConfig
    learner: LearnerConfig


def own_settings(policy: PolicyConfig, run: Own) -> Own:
    """The run's settings, with the policy's own in their place; another algorithm than the run's
    begins with the defaults.

    Raises UserError for one that does not exist, or that no policy can have for itself.
    """
    for name in OF_THE_RUN:
        if name in policy.algorithm:
            raise UserError(
                f"policies.{policy.name}.algorithm.{name}: all policies learn from the same "
                f"rollouts; set algorithm.{name}"
            )
    where = f"policies.{policy.name}"
    algorithm = run.algorithm
    if policy.algorithm.get("name", algorithm.name) != algorithm.name:
        # What the run's algorithm is set to means nothing to another one.
        shared = {name: getattr(algorithm, name) for name in OF_THE_RUN}
        algorithm = AlgorithmConfig(**shared)
    own = Own(
        algorithm=_merged(algorithm, policy.algorithm, f"{where}.algorithm"),
        credit=_merged(run.credit, policy.credit, f"{where}.credit"),
        learner=_merged(run.learner, policy.learner, f"{where}.learner"),
    )
    if not (policy.algorithm or policy.credit or policy.learner):
        return own
    try:
        rate = critic_rate(own.algorithm) if policy.algorithm else own.learner.critic_rate
        # A copy: what is not its own is other policies' as well.
        own = replace(own, learner=replace(own.learner, critic_rate=rate))
        check_own(own)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return own


def critic_rate(algorithm: AlgorithmConfig) -> float:
    """The learning rate of the algorithm's critic, times the policy's; 0 where it has none."""
    return algorithm.loss.critic.rate if _has_critic(make_algorithm(algorithm)) else 0.0


def check_own(own: Own) -> None:
    """Checks what one policy learns by. Raises UserError."""
    algorithm = make_algorithm(own.algorithm)
    check_credit(own.credit)
    if _has_critic(algorithm) and (own.credit.by_call or own.credit.roles):
        raise UserError(
            "credit.steps, credit.discount and credit.roles give each call a credit of its own, "
            "which a critic estimates by itself; leave them out, or set "
            "algorithm.loss.critic.coefficient=0"
        )
    needs_contrast = own.credit.is_plain and getattr(algorithm, "needs_contrast", True)
    if own.algorithm.extra_rounds and not needs_contrast:
        raise UserError(
            f"algorithm.extra_rounds={own.algorithm.extra_rounds}: other tasks are tried in "
            "place of groups with one reward throughout, which teach here as well; set it to 0"
        )
    check_learner(own.learner)


def _has_critic(algorithm: Algorithm) -> bool:
    return algorithm.loss.critic.coefficient > 0 and own_loss(algorithm) is None


def _merged(run: Any, own: dict[str, Any], where: str) -> Any:
    if not own:
        return run
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(run), own))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {reason}") from error
