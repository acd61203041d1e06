"""Dynamic sampling: other tasks in place of those whose attempts all did equally well.

DAPO (Yu et al., 2025, arXiv:2503.14476, section 3.2). Invariant: tasks are taken in their order and
each is tried once, so where a run stands in the order says all that a resumed one must know.
"""

from collections.abc import Callable, Sequence

from lightning_ray.agents import Task
from lightning_ray.rollouts import RolloutRecord
from lightning_ray.training.rolling import came_to_reward

Run = Callable[[Sequence[Task], int], list[RolloutRecord]]
"""Tasks, and the number of the first of their groups within the step, to their rollouts, ended."""


def fill_up(
    run: Run, take: Callable[[int, int], Sequence[Task]], wanted: int, rounds: int
) -> tuple[list[Task], list[RolloutRecord]]:
    """Runs `wanted` tasks, and others until as many groups have contrast.

    Args:
        take: (begin, count) to so many tasks of the order, from `begin` after those of this step.
        rounds: the most times that others are tried.

    Returns:
        Every task that was taken, in order, and all their rollouts.
    """
    tasks = list(take(0, wanted))
    records = run(tasks, 0)
    for _ in range(rounds):
        missing = wanted - with_contrast(records)
        if missing <= 0:
            break
        more = take(len(tasks), missing)
        records = [*records, *run(more, len(tasks))]
        tasks += more
    return tasks, records


def with_contrast(records: Sequence[RolloutRecord]) -> int:
    """How many groups have attempts of different reward."""
    rewards: dict[str, set[float]] = {}
    for record in records:
        if came_to_reward(record) and record.outcome is not None:
            rewards.setdefault(record.spec.group_id, set()).add(record.outcome.rewards["reward"])
    return sum(len(different) > 1 for different in rewards.values())
