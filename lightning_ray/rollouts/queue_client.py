"""The queue of rollouts as the rest of a run sees it: started, and asked with timeouts.

Invariant: what it raises is ours, never Ray's; a queue that restarts is waited for.
"""

from collections.abc import Sequence
from pathlib import Path

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_ray.rollouts.asking import ask
from lightning_ray.rollouts.config import RolloutsConfig
from lightning_ray.rollouts.lives import Counts
from lightning_ray.rollouts.queue import RolloutQueue
from lightning_ray.rollouts.types import RolloutRecord, RolloutSpec, WorkerRecord
from lightning_ray.spans import SpanClient

START_TIMEOUT_S = 120.0


class QueueClient:
    """The queue as the trainer sees it: with timeouts, and without Ray's exceptions."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor

    def enqueue(self, specs: Sequence[RolloutSpec], timeout_s: float = 30.0) -> int:
        """Queues rollouts in order; returns how many were new."""
        new: int = ask(lambda: self.actor.enqueue.remote(list(specs)), timeout_s, "queue rollouts")
        return new

    def wait(
        self, rollout_ids: Sequence[str], timeout_s: float, at_least: int | None = None
    ) -> list[RolloutRecord]:
        """The records of the rollouts that ended within `timeout_s` seconds.

        Returns once all have, or as soon as `at_least` so many have.
        """
        ids = list(rollout_ids)
        records: list[RolloutRecord] = ask(
            lambda: self.actor.wait.remote(ids, timeout_s, at_least),
            timeout_s + 30,
            "wait for rollouts",
            timeout_s,
        )
        return records

    def cancel(self, rollout_ids: Sequence[str], timeout_s: float = 30.0) -> None:
        """Cancels rollouts that have not ended."""
        ask(lambda: self.actor.cancel.remote(list(rollout_ids)), timeout_s, "cancel rollouts")

    def retry(self, rollout_ids: Sequence[str], timeout_s: float = 30.0) -> list[str]:
        """Queues ended rollouts again; returns those that had ended."""
        ids = list(rollout_ids)
        # Once: made again it would queue what has meanwhile ended once more.
        queued: list[str] = ask(
            lambda: self.actor.retry.remote(ids), timeout_s, "retry rollouts", timeout_s
        )
        return queued

    def lose(self, worker: str, timeout_s: float = 30.0) -> list[str]:
        """Has what a dead worker ran tried again; returns its attempts."""
        lost: list[str] = ask(lambda: self.actor.lose.remote(worker), timeout_s, "lose a worker")
        return lost

    def hold(self, held: bool, timeout_s: float = 30.0) -> None:
        """Has nothing handed out, and what runs tried again later; or goes on (`held` false)."""
        ask(lambda: self.actor.hold.remote(held), timeout_s, "hold")

    def counts(self, timeout_s: float = 30.0) -> Counts:
        """How many rollouts stand where."""
        counts: Counts = ask(self.actor.counts.remote, timeout_s, "count rollouts")
        return counts

    def engines_are_at(self, policy: str, urls: Sequence[str], timeout_s: float = 30.0) -> None:
        """Has the doors find a policy's engines at other addresses than they were told."""
        asking = self.actor.engines_are_at.remote
        ask(lambda: asking(policy, list(urls)), timeout_s, "note where engines are")

    def workers(self, timeout_s: float = 30.0) -> list[WorkerRecord]:
        """The workers that were heard of."""
        found: list[WorkerRecord] = ask(self.actor.workers.remote, timeout_s, "list its workers")
        return found

    def forget(self, rollout_ids: Sequence[str]) -> None:
        """Drops ended rollouts from the queue's memory, without waiting for it."""
        self.actor.forget.remote(list(rollout_ids))


def start_queue(
    run_id: str,
    config: RolloutsConfig,
    folder: Path | None = None,
    spans: SpanClient | None = None,
) -> QueueClient:
    """Starts the queue of one run's session.

    It keeps its journal in `folder`, and restarts from it; without one it is in memory only.
    `spans` are its heartbeats. Raises InfrastructureError when it does not start.
    """
    # Where the job was started: of other nodes any may come and go. Not softly: for an actor that
    # needs no processor Ray takes that for leave to place it anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RolloutQueue).options(
        num_cpus=0,
        max_concurrency=10_000,
        max_restarts=0 if folder is None else -1,
        scheduling_strategy=here,
    )
    # As bytes: arguments with references in them may be gone when the actor restarts.
    heartbeats = None if spans is None else cloudpickle.dumps(spans)
    client = QueueClient(actor.remote(run_id, config, folder and str(folder), heartbeats))
    # Waited for: an actor's calls may overtake each other, and this one clears the table.
    ask(client.actor.begin.remote, START_TIMEOUT_S, "begin", START_TIMEOUT_S)
    return client
