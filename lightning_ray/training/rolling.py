"""Running rollouts to their end, for whoever needs their records: training steps, evaluations."""

import logging
import time
from collections.abc import Sequence

from lightning_ray.agents import Task
from lightning_ray.rollouts import QueueClient, RolloutRecord, RolloutSpec, RolloutStatus
from lightning_ray.tracking import Progress
from lightning_ray.training.config import TrainConfig

log = logging.getLogger(__name__)


def rollout_specs(
    prefix: str, session: str, tasks: Sequence[Task], samples: int, config: TrainConfig
) -> list[RolloutSpec]:
    """`samples` rollouts of each task, a group per task.

    Ids begin with `prefix`; `session` tells apart what is done a second time.
    """
    return [
        RolloutSpec(
            rollout_id=f"{prefix}-{session}-{place:04d}-{sample:02d}",
            task_id=task.id,
            task=task.data,
            timeout_s=config.agent.timeout_s,
            max_attempts=config.rollouts.max_attempts,
            group_id=f"{prefix}-{place:04d}",
        )
        for place, task in enumerate(tasks)
        for sample in range(samples)
    ]


def run_rollouts(
    queue: QueueClient, specs: Sequence[RolloutSpec], timeout_s: float, progress: Progress
) -> list[RolloutRecord]:
    """Queues rollouts and waits; returns their records in order, all ended.

    What has not ended after `timeout_s` seconds is cancelled.
    """
    ids = [spec.rollout_id for spec in specs]
    progress.update(queue=len(ids))
    queue.enqueue(specs)
    deadline = time.monotonic() + timeout_s
    while True:
        # In slices, so that the panel shows the queue and Ctrl-C is heard.
        records = queue.wait(ids, min(2.0, timeout_s))
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


def came_to_reward(record: RolloutRecord) -> bool:
    """Whether a rollout came to an outcome of the agent that was graded."""
    return record.status is RolloutStatus.SUCCEEDED


def why_not(record: RolloutRecord) -> str:
    """Why a rollout came to no reward: its last attempt's status and the end of its stderr."""
    if record.outcome is None:
        return f"{record.spec.rollout_id}: {record.status.value}"
    error = " | ".join(line for line in record.outcome.error.splitlines() if line.strip())
    tail = error if len(error) <= 400 else error[:120] + " ... " + error[-270:]
    return f"{record.spec.rollout_id} ({record.outcome.status.value}): {tail}"


def note_failures(records: Sequence[RolloutRecord], progress: Progress) -> None:
    """Says how many rollouts came to no reward, and why the first did not."""
    failed = [record for record in records if not came_to_reward(record)]
    if failed:
        progress.note(
            f"{len(failed)} of {len(records)} rollouts left out; the first: {why_not(failed[0])}"
        )
