"""Running rollouts to their end, for whoever needs their records: training steps, evaluations."""

import logging
import time
from collections.abc import Callable, Sequence

from lightning_ray.agents import Task
from lightning_ray.evaluation import EvaluationConfig, Outcome, read_outcomes
from lightning_ray.inference import what_is_set
from lightning_ray.rollouts import QueueClient, RolloutRecord, RolloutSpec, RolloutStatus, policy_of
from lightning_ray.spans import SpanClient
from lightning_ray.tracking import Progress
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.names import rollout_id
from lightning_ray.training.rehearsal import why

log = logging.getLogger(__name__)


def rollout_specs(
    prefix: str,
    session: str,
    tasks: Sequence[Task],
    samples: int,
    config: TrainConfig,
    *,
    heldout: bool = False,
    first: int = 0,
) -> list[RolloutSpec]:
    """`samples` rollouts of each task, a group per task; the groups are numbered from `first`.

    Ids begin with `prefix`; `session` tells apart what is done a second time. `heldout` says that
    these are held-out tasks, sampled as `rollouts.heldout_sampling` says.
    """
    sampling = config.rollouts.heldout_sampling if heldout else config.rollouts.sampling
    settings = what_is_set(sampling)
    return [
        RolloutSpec(
            rollout_id=rollout_id(prefix, session, place, sample),
            task_id=task.id,
            task=task.data,
            group_id=f"{prefix}-{place:04d}",
            sampling=settings,
            **policy_of(config.rollouts, config.agent.timeout_s, task.id, task.data),
        )
        for place, task in enumerate(tasks, first)
        for sample in range(samples)
    ]


def run_rollouts(
    queue: QueueClient,
    specs: Sequence[RolloutSpec],
    timeout_s: float,
    progress: Progress,
    watch: Callable[[], None] = lambda: None,
) -> list[RolloutRecord]:
    """Queues rollouts and waits; returns their records in order, all ended.

    What has not ended after `timeout_s` seconds is cancelled. `watch` is called while it waits.
    """
    ids = [spec.rollout_id for spec in specs]
    progress.update(queue=len(ids))
    queue.enqueue(specs)
    deadline = time.monotonic() + timeout_s
    while True:
        # In slices, so that the panel shows the queue and Ctrl-C is heard.
        records = queue.wait(ids, min(2.0, timeout_s))
        watch()
        counts = queue.counts()
        progress.update(queue=counts.queued, running=counts.running)
        if len(records) == len(ids):
            break
        if time.monotonic() > deadline:
            queue.cancel(ids)
            records = queue.wait(ids, 10.0)
            log.warning("cancelled what was unfinished of %s ...", ids[0])
            break
    queue.forget(ids)
    return records


def outcomes_of(
    records: Sequence[RolloutRecord], store: SpanClient, config: EvaluationConfig
) -> list[Outcome]:
    """What the spans say of rollouts that have ended, in the order of `records`."""
    attempts = [attempt_id for record in records for attempt_id, _ in record.attempts]
    return read_outcomes(
        store.get(attempts),
        rollback_words=config.measures.rollback_words,
        rollout_ids=[record.spec.rollout_id for record in records],
    )


def came_to_reward(record: RolloutRecord) -> bool:
    """Whether a rollout came to an outcome of the agent that was graded."""
    return record.status is RolloutStatus.SUCCEEDED


def note_failures(records: Sequence[RolloutRecord], progress: Progress) -> None:
    """Says how many rollouts came to no reward, and why the first did not."""
    failed = [record for record in records if not came_to_reward(record)]
    if failed:
        progress.note(
            f"{len(failed)} of {len(records)} rollouts left out; the first: {why(failed[0])}"
        )
