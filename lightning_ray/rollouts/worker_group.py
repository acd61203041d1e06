"""The rollout workers of a job: started, replaced when they die, more and fewer of them, stopped.

Invariant: what a dead worker ran is tried again as soon as its death is seen, not when its attempts
are overdue; that is a fault, which costs the agent none of its attempts.
"""

import logging
import math
import secrets
import time
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from lightning_ray.agents import AgentConfig
from lightning_ray.errors import own_error
from lightning_ray.rollouts.config import RolloutsConfig
from lightning_ray.rollouts.lives import Counts
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
    """`config.num_workers` workers, or up to `config.max_workers`, that take from one queue."""

    def __init__(
        self,
        config: RolloutsConfig,
        agent: AgentConfig,
        queue: QueueClient,
        spans: SpanClient,
        gateway_url: str,
        wait: bool = True,
    ):
        """Starts the workers; they take work at once. Raises what `RolloutWorker.start` raises.

        Without `wait` that is for `wait_started` to raise, so that others can start meanwhile.
        """
        self._config = config
        self._arguments = (agent, config.slots_per_worker, queue.actor, spans, gateway_url)
        self._queue = queue
        self._actor = ray.remote(RolloutWorker).options(
            num_cpus=config.num_cpus,
            label_selector=config.node_labels or None,
            max_concurrency=100,
            max_restarts=0,
        )
        self._new: list[ray.ObjectRef] = []
        """Of those that have been started, the ends of their starts, until they are looked at."""
        self._workers = [self._start() for _ in range(config.num_workers)]
        self._leaving: dict[str, tuple[_Worker, ray.ObjectRef]] = {}
        """Those that take no more work, and when what they run has ended."""
        self._enough_since: float | None = None
        """Since when fewer workers would do."""
        if wait:
            self.wait_started()

    def wait_started(self) -> None:
        """Waits for the first workers. Raises what `RolloutWorker.start` raises."""
        ray.get([worker.started for worker in self._workers], timeout=START_TIMEOUT_S)

    def mend(self) -> int:
        """Replaces the workers that have died, and has what they ran tried again; how many died.

        Does not wait for the new ones. Raises InfrastructureError when the queue does not answer.
        """
        self._see_off()
        self._look_at_new()
        gone, _ = ray.wait(
            [worker.gone for worker in self._workers], num_returns=len(self._workers), timeout=0
        )
        dead = [worker for worker in self._workers if worker.gone in gone]
        for worker in dead:
            log.warning("rollout worker %s died; another takes its place", worker.name)
            self._queue.lose(worker.name)
            self._workers[self._workers.index(worker)] = self._start()
        return len(dead)

    def fit(self, counts: Counts, now: float | None = None) -> int:
        """Starts workers when more rollouts wait than those there can run, and lets workers go when
        fewer would have done for `idle_s` seconds; returns how many more there are, or fewer.

        A worker that goes ends what it runs first; a new one is not waited for. `now` is on the
        monotonic clock.
        """
        config, now = self._config, time.monotonic() if now is None else now
        wanted = math.ceil((counts.queued + counts.running) / config.slots_per_worker)
        most = max(config.max_workers, config.num_workers)
        change = min(max(wanted, config.num_workers), most) - len(self._workers)
        if change >= 0:
            self._enough_since = None
            self._workers += [self._start() for _ in range(change)]
            return change
        if self._enough_since is None:
            self._enough_since = now
        if now < self._enough_since + config.idle_s:
            return 0
        self._enough_since = None
        # The newest, whose nodes may have been brought for them; what they run they end first.
        for worker in self._workers[change:]:
            self._workers.remove(worker)
            if ray.wait([worker.started], timeout=0)[0]:
                self._leaving[worker.name] = (worker, worker.actor.drain.remote())
            else:
                # It waits for a node, and nobody needs it any more.
                ray.kill(worker.actor)
                self._queue.lose(worker.name)
        return change

    @property
    def count(self) -> int:
        """Workers that take work, those that are starting among them."""
        return len(self._workers)

    def _look_at_new(self) -> None:
        """Raises what kept a worker from starting: it would count, and run nothing."""
        if not self._new:
            return
        ready, self._new = ray.wait(self._new, num_returns=len(self._new), timeout=0)
        for started in ready:
            try:
                ray.get(started, timeout=START_TIMEOUT_S)
            except ray.exceptions.RayActorError:
                continue  # It died, which is seen to.
            except ray.exceptions.RayTaskError as error:
                raise own_error(error) from None

    def _see_off(self) -> None:
        """Ends the workers that have nothing left to do."""
        for name, (worker, drained) in list(self._leaving.items()):
            if not ray.wait([drained], timeout=0)[0]:
                continue
            del self._leaving[name]
            # One that died on its way out, say with the node it was on, leaves what it ran.
            self._queue.lose(name)
            ray.kill(worker.actor)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stops the workers and every agent they run."""
        workers = [*self._workers, *(worker for worker, _ in self._leaving.values())]
        stopping = [worker.actor.stop.remote() for worker in workers]
        ray.wait(stopping, num_returns=len(stopping), timeout=timeout_s)
        for worker in workers:
            ray.kill(worker.actor)

    def _start(self) -> _Worker:
        name = secrets.token_hex(8)
        actor = self._actor.remote(*self._arguments, name, self._config.worker_lost_s / 4)
        worker = _Worker(name, actor, actor.start.remote(), actor.gone.remote())
        self._new.append(worker.started)
        return worker
