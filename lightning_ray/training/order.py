"""The order in which tasks, or samples, are trained on: a pure function of seed and position.

Invariant: what is at positions p, p+1, ... is the same whether the run was interrupted or not;
each epoch holds everything once.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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


class SampleOrder:
    """Steps over `count` samples: each epoch is a new order, cut into batches of nearly one size.

    No batch crosses the end of an epoch, and none is smaller than another by more than one sample:
    the last step of an epoch weighs what the others weigh.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self._count = count
        self._seed = seed
        self.steps_per_epoch = -(-count // batch_size)

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of the samples of step `step`, which counts from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
        return np.array_split(order, self.steps_per_epoch)[place]
