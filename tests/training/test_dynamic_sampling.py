"""Other tasks in place of those that teach nothing."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.agents import Task
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
)
from lightning_ray.training.dynamic import fill_up, with_contrast

GROUPS = st.lists(
    st.lists(st.sampled_from([None, 0.0, 1.0]), min_size=2, max_size=4), min_size=40, max_size=40
)


def group(number: int, rewards: list[float | None]) -> list[RolloutRecord]:
    records = []
    for sample, reward in enumerate(rewards):
        status = AttemptStatus.FAILED if reward is None else AttemptStatus.SUCCEEDED
        outcome = AttemptOutcome(status, {} if reward is None else {"reward": reward})
        ended = RolloutStatus.FAILED if reward is None else RolloutStatus.SUCCEEDED
        name = f"r{number}-{sample}"
        spec = RolloutSpec(name, "task", {}, 1.0, group_id=f"g{number}")
        records.append(RolloutRecord(spec, ended, ((f"{name}/1", status),), outcome))
    return records


@given(GROUPS, st.integers(1, 8), st.integers(0, 4))
def test_tasks_are_taken_in_order_once_until_enough_have_contrast(
    groups: list[list[float | None]], wanted: int, rounds: int
) -> None:
    asked: list[tuple[int, int]] = []

    def run(tasks: list[Task], first: int) -> list[RolloutRecord]:
        asked.append((first, len(tasks)))
        assert [task.id for task in tasks] == [str(first + n) for n in range(len(tasks))]
        return [r for n, _ in enumerate(tasks, first) for r in group(n, groups[n])]

    def take(begin: int, count: int) -> list[Task]:
        return [Task(str(number), {}) for number in range(begin, begin + count)]

    tasks, records = fill_up(run, take, wanted, rounds)
    assert [task.id for task in tasks] == [str(number) for number in range(len(tasks))]
    assert asked[0] == (0, wanted) and len(asked) <= 1 + rounds
    assert sum(count for _, count in asked) == len(tasks)
    teaching = [{0.0, 1.0} <= set(rewards) for rewards in groups[: len(tasks)]]
    assert with_contrast(records) == sum(teaching) <= wanted
    # It stops early only when there are enough, and never when one is missing and a round is left.
    assert sum(teaching) == wanted or len(asked) == 1 + rounds
    assert len({record.spec.rollout_id for record in records}) == len(records)
