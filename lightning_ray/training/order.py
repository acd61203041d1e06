"""The order in which tasks are trained on: a pure function of the seed and the position.

Invariant: the tasks at positions p, p+1, ... are the same whether the run was interrupted or not;
each epoch holds every task once.
"""

from collections.abc import Sequence

import numpy as np

from lightning_ray.agents import Task


class TaskOrder:
    """An endless order over `tasks`, reshuffled every epoch."""

    def __init__(self, tasks: Sequence[Task], seed: int):
        self._tasks = list(tasks)
        self._seed = seed

    def take(self, position: int, count: int) -> list[Task]:
        """The `count` tasks from `position` (counted from 0 over all epochs) on."""
        return [self._at(place) for place in range(position, position + count)]

    def _at(self, position: int) -> Task:
        epoch, place = divmod(position, len(self._tasks))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._tasks))
        return self._tasks[order[place]]
