"""Rollouts: tasks run to an outcome.

Owns the queue, the lifecycle of rollouts and attempts, and the worker actors that launch agents. It
must not know what is done with the spans, nor what a reward is used for.
"""

from lightning_ray.rollouts.asking import ask_async
from lightning_ray.rollouts.config import (
    RolloutsConfig,
    check_rollouts,
    check_task_policies,
    policy_of,
)
from lightning_ray.rollouts.line import Line
from lightning_ray.rollouts.queue_client import QueueClient, start_queue
from lightning_ray.rollouts.roster import RosterReader
from lightning_ray.rollouts.types import (
    AttemptOutcome,
    AttemptStatus,
    Identity,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
    WorkerRecord,
)
from lightning_ray.rollouts.worker_group import WorkerGroup

__all__ = [
    "AttemptOutcome",
    "AttemptStatus",
    "Identity",
    "Line",
    "QueueClient",
    "RolloutRecord",
    "RolloutSpec",
    "RolloutStatus",
    "RolloutsConfig",
    "RosterReader",
    "WorkerGroup",
    "WorkerRecord",
    "ask_async",
    "check_rollouts",
    "check_task_policies",
    "policy_of",
    "start_queue",
]
