"""Configuration of rollouts (Hydra group `rollouts`)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.errors import UserError
from lightning_ray.inference import SamplingConfig, check_sampling
from lightning_ray.rollouts.types import RETRIED, AttemptStatus

TASK_FIELD = "rollout"
"""The field of a task that holds settings of its own."""
_OF_A_TASK: dict[str, tuple[type, float | None]] = {
    "timeout_s": (float, 0),
    "max_attempts": (int, 1),
    "priority": (int, None),
    "silence_s": (float, 0),
}


@dataclass
class RolloutsConfig:
    """How tasks become rollouts."""

    num_workers: int = 1
    """Worker actors that launch agents; there are never fewer."""
    max_workers: int = 0
    """Workers that there may be while more rollouts wait than `num_workers` can run; 0 is no more
    than these. With `num_cpus` above 0 Ray's autoscaler brings the nodes for them."""
    idle_s: float = 120.0
    """After fewer would have done for so long, the workers above `num_workers` go, seconds."""
    slots_per_worker: int = 64
    """Agents that one worker runs at the same time."""
    max_attempts: int = 2
    """Attempts of a rollout before it is left out: the first, and the retries."""
    silence_s: float = 0.0
    """An attempt that sends no span for so long is unresponsive, seconds; 0 sets no limit."""
    retry_on: list[str] = field(default_factory=lambda: ["failed", "timed_out", "unresponsive"])
    """The ends of an attempt after which the agent is tried again."""
    max_faults: int = 3
    """Times that a rollout is tried again after a fault of ours, beside the agent's attempts."""
    worker_lost_s: float = 60.0
    """A worker that says nothing for so long is lost, and what it ran is tried again, seconds."""
    grace_s: float = 15.0
    """An attempt that is not reported this long after its timeout lost its worker, seconds."""
    linger_s: float = 60.0
    """Telemetry and rewards of an attempt are still taken this long after its end, seconds."""
    batch_timeout_s: float = 1800.0
    """Longest that the trainer waits for the rollouts of one batch, seconds."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the calls of rollouts are sampled; what is null is left to the agent."""
    heldout_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """The same for rollouts of held-out tasks."""
    num_cpus: float = 0.0
    """Processors that Ray sets aside for one worker."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have for a worker to be placed there (Ray's label selectors)."""


def check_rollouts(config: RolloutsConfig) -> None:
    """Raises UserError for values that no queue can run with."""
    for name in ("num_workers", "slots_per_worker", "max_attempts"):
        if getattr(config, name) < 1:
            raise UserError(f"rollouts.{name}={getattr(config, name)}: must be at least 1")
    if config.max_workers and config.max_workers < config.num_workers:
        raise UserError(
            f"rollouts.max_workers={config.max_workers}: must be 0, or at least "
            f"rollouts.num_workers={config.num_workers}"
        )
    for name in ("grace_s", "batch_timeout_s", "worker_lost_s", "idle_s"):
        if getattr(config, name) <= 0:
            raise UserError(f"rollouts.{name}={getattr(config, name)}: must be above 0 seconds")
    for name in ("linger_s", "silence_s", "max_faults"):
        if getattr(config, name) < 0:
            raise UserError(f"rollouts.{name}={getattr(config, name)}: must be 0 or above")
    check_sampling(config.sampling, "rollouts.sampling")
    check_sampling(config.heldout_sampling, "rollouts.heldout_sampling")
    known = [status.value for status in RETRIED]
    for status in config.retry_on:
        if status not in known:
            raise UserError(f"rollouts.retry_on: {status!r} is none of {', '.join(known)}")


def policy_of(
    config: RolloutsConfig, timeout_s: float, task_id: str, task: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a RolloutSpec that say how long and how often a task is tried.

    They are the run's, and over them what the task itself says in its field "rollout", if that is
    an object: timeout_s, max_attempts, priority, silence_s. Raises UserError for what cannot be.
    """
    policy: dict[str, Any] = {
        "timeout_s": timeout_s,
        "max_attempts": config.max_attempts,
        "silence_s": config.silence_s,
        "max_faults": config.max_faults,
        "retry_on": tuple(AttemptStatus(status) for status in config.retry_on),
    }
    own = task.get(TASK_FIELD)
    if not isinstance(own, Mapping):
        return policy
    for name, value in own.items():
        where = f"task {task_id}: {TASK_FIELD}.{name}={value!r}"
        if name not in _OF_A_TASK:
            raise UserError(f"{where}: no such setting; there are {', '.join(_OF_A_TASK)}")
        kind, least = _OF_A_TASK[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (kind is float and isinstance(value, float)):
            raise UserError(f"{where}: must be a {'whole ' if kind is int else ''}number")
        if not math.isfinite(value) or (least is not None and value < least):
            raise UserError(f"{where}: must be at least {least or 0:g}, and finite")
        if name == "timeout_s" and value == 0:
            raise UserError(f"{where}: must be above 0 seconds")
        policy[name] = kind(value)
    return policy


def check_task_policies(
    config: RolloutsConfig, tasks: Iterable[tuple[str, Mapping[str, Any]]]
) -> None:
    """Raises UserError for a task (id, data) whose own settings cannot be."""
    for task_id, task in tasks:
        policy_of(config, 1.0, task_id, task)
