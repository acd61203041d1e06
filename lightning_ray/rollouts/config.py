"""Configuration of rollouts (Hydra group `rollouts`)."""

from dataclasses import dataclass, field

from lightning_ray.errors import UserError


@dataclass
class RolloutsConfig:
    """How tasks become rollouts."""

    num_workers: int = 1
    """Worker actors that launch agents."""
    slots_per_worker: int = 64
    """Agents that one worker runs at the same time."""
    max_attempts: int = 2
    """Attempts of a rollout before it is left out: the first, and the retries."""
    grace_s: float = 15.0
    """An attempt that is not reported this long after its timeout lost its worker, seconds."""
    linger_s: float = 60.0
    """Telemetry and rewards of an attempt are still taken this long after its end, seconds."""
    batch_timeout_s: float = 1800.0
    """Longest that the trainer waits for the rollouts of one batch, seconds."""
    num_cpus: float = 0.0
    """Processors that Ray sets aside for one worker."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have for a worker to be placed there (Ray's label selectors)."""


def check_rollouts(config: RolloutsConfig) -> None:
    """Raises UserError for values that no queue can run with."""
    for name in ("num_workers", "slots_per_worker", "max_attempts"):
        if getattr(config, name) < 1:
            raise UserError(f"rollouts.{name}={getattr(config, name)}: must be at least 1")
    for name in ("grace_s", "batch_timeout_s"):
        if getattr(config, name) <= 0:
            raise UserError(f"rollouts.{name}={getattr(config, name)}: must be above 0 seconds")
    if config.linger_s < 0:
        raise UserError(f"rollouts.linger_s={config.linger_s}: must be 0 or above")
