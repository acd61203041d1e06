from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.agents import Task
from lightning_ray.training.order import TaskOrder

COUNTS = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def tasks(count: int) -> list[Task]:
    return [Task(f"t{number}", {"q": number}) for number in range(count)]


@given(COUNTS, SEEDS, st.lists(st.integers(0, 7), max_size=8))
def test_the_order_does_not_depend_on_how_it_is_taken(
    count: int, seed: int, steps: list[int]
) -> None:
    whole = TaskOrder(tasks(count), seed).take(0, sum(steps))
    position = 0
    for step in steps:
        # A new object for each step, as after a resume.
        taken = TaskOrder(tasks(count), seed).take(position, step)
        assert taken == whole[position : position + step]
        position += step


@given(COUNTS, SEEDS, st.integers(0, 1000))
def test_every_epoch_has_every_task_once(count: int, seed: int, epoch: int) -> None:
    order = TaskOrder(tasks(count), seed)
    taken = [task.id for task in order.take(epoch * count, count)]
    assert sorted(taken) == sorted(task.id for task in tasks(count))


def test_epochs_and_seeds_differ_in_their_order() -> None:
    first, second, other = (
        [task.id for task in TaskOrder(tasks(50), seed).take(position, 50)]
        for seed, position in ((0, 0), (0, 50), (1, 0))
    )
    assert first != second and first != other
    assert first != [task.id for task in tasks(50)]
