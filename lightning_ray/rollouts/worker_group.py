"""The rollout workers of a job: started, replaced when they die, stopped.

Invariant: what a dead worker ran is tried again as soon as its death is seen, not when its attempts
are overdue; that is a fault, which costs the agent none of its attempts.
"""

import logging
import secrets
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from lightning_ray.agents import AgentConfig
from lightning_ray.rollouts.config import RolloutsConfig
from lightning_ray.rollouts.queue_client import QueueClient
from lightning_ray.rollouts.worker import RolloutWorker
from lightning_ray.spans import SpanClient

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class _Worker:
    """One actor, and how its death is heard of."""

    name: str
    actor: ActorHandle
    started: "ray.ObjectRef"
    gone: "ray.ObjectRef"
    """Of a call that never returns; ready, with an error, once the actor is dead."""


class WorkerGroup:
    """`config.num_workers` workers that take from one queue."""

    def __init__(
        self,
        config: RolloutsConfig,
        agent: AgentConfig,
        queue: QueueClient,
        spans: SpanClient,
        gateway_url: str,
    ):
        """Starts the workers; they take work at once. Raises what `RolloutWorker.start` raises."""
        self._config = config
        self._arguments = (agent, config.slots_per_worker, queue.actor, spans, gateway_url)
        self._queue = queue
        self._actor = ray.remote(RolloutWorker).options(
            num_cpus=config.num_cpus,
            label_selector=config.node_labels or None,
            max_concurrency=100,
            max_restarts=0,
        )
        self._workers = [self._start() for _ in range(config.num_workers)]
        ray.get([worker.started for worker in self._workers], timeout=START_TIMEOUT_S)

    def mend(self) -> int:
        """Replaces the workers that have died, and has what they ran tried again; how many died.

        Does not wait for the new ones. Raises InfrastructureError when the queue does not answer.
        """
        gone, _ = ray.wait(
            [worker.gone for worker in self._workers], num_returns=len(self._workers), timeout=0
        )
        dead = [worker for worker in self._workers if worker.gone in gone]
        for worker in dead:
            log.warning("rollout worker %s died; another takes its place", worker.name)
            self._queue.lose(worker.name)
            self._workers[self._workers.index(worker)] = self._start()
        return len(dead)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stops the workers and every agent they run."""
        stopping = [worker.actor.stop.remote() for worker in self._workers]
        ray.wait(stopping, num_returns=len(stopping), timeout=timeout_s)
        for worker in self._workers:
            ray.kill(worker.actor)

    def _start(self) -> _Worker:
        name = secrets.token_hex(8)
        actor = self._actor.remote(*self._arguments, name, self._config.worker_lost_s / 4)
        return _Worker(name, actor, actor.start.remote(), actor.gone.remote())
