"""Groups of rollouts on their way from the order of tasks to the learner.

A group is admitted when there is room for it, runs, is ready once all its rollouts have ended, and
is taken by a step. One number makes this synchronous or asynchronous. With `staleness` 0 a step's
groups are admitted when the step before has been learnt from; with more, so many steps' groups go
on being sampled while the learner learns and the weights change.

How much room there is, `Hand` says.

Invariant: every position of the order below `position` is in hand, or was taken or dropped, once.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts import QueueClient, RolloutRecord, RolloutSpec
from lightning_ray.tracking import Progress
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.hand import FlowGroup, Hand
from lightning_ray.training.order import TaskOrder
from lightning_ray.training.rolling import rollout_specs

log = logging.getLogger(__name__)

SLICE_S = 2.0
CANCEL_S = 60.0
"""How long rollouts that were cancelled may take to end, seconds."""


@dataclass(frozen=True)
class Taken:
    """What a step learns from."""

    records: list[RolloutRecord]
    """All ended, group by group, in the order of the tasks."""
    tasks: int
    stale: int
    """Groups that were dropped before it, because their tokens were too old."""


Oldest = Callable[[Sequence[RolloutRecord]], Mapping[str, Mapping[str, int]]]
"""The oldest version that sampled a token of each group, by group and then by policy; nothing of
those without any."""

Behind = Callable[[Mapping[str, int]], int]
"""How many updates of the weights there were since such versions, by policy: the most of any."""


class Flow:
    """Admits groups to the queue, and hands a step those that are ready."""

    def __init__(
        self,
        config: TrainConfig,
        queue: QueueClient,
        order: TaskOrder,
        oldest: Oldest,
        progress: Progress,
        watch: Callable[[], None] = lambda: None,
    ):
        """`oldest` is asked only where data can be stale; `watch` is called while it waits."""
        training = config.training
        self._config = config
        self._queue = queue
        self._order = order
        self._oldest = oldest
        self._progress = progress
        self._watch = watch
        self._hand = Hand(
            training.tasks_per_step,
            training.staleness,
            training.steps,
            config.algorithm.extra_rounds,
            training.past_the_end,
        )
        # Rollouts of a step that is done again after a resume must not be taken for the first ones.
        self._session = secrets.token_hex(3)
        self._again: list[int] = []
        self._named = (0, 0)
        self.position = 0
        """Of the next task in the order."""

    def restore(self, position: int, in_hand: Sequence[int]) -> None:
        """Goes on as a run that stood at `position`, with the groups of `in_hand` not yet taken."""
        self.position = position
        self._again = list(in_hand)

    @property
    def in_hand(self) -> list[int]:
        """Positions that were admitted, and neither taken nor dropped."""
        return sorted([*self._again, *(group.position for group in self._hand.groups)])

    def abandon(self) -> int:
        """Cancels all that is under way, and says how many groups that were; another flow does them
        again."""
        groups = self._hand.groups
        names = [spec.rollout_id for group in groups for spec in group.specs]
        if not names:
            return 0
        self._queue.cancel(names)
        ended = self._queue.wait(names, CANCEL_S)
        if len(ended) < len(names):
            raise InfrastructureError(
                f"{len(names) - len(ended)} rollouts did not end within {CANCEL_S:g} s after they "
                "were cancelled"
            )
        self._forget(groups)
        return len(groups)

    def admit(self, step: int) -> None:
        """Queues as many groups as there is room for when `step` steps have been trained."""
        specs: list[RolloutSpec] = []
        for _ in range(self._hand.room(step)):
            position = self._next()
            # Named after the step that is awaited, and numbered within it.
            number = self._named[1] if self._named[0] == step + 1 else 0
            self._named = (step + 1, number + 1)
            mine = rollout_specs(
                f"s{step + 1:05d}",
                self._session,
                self._order.take(position, 1),
                self._config.algorithm.group_size,
                self._config,
                first=number,
            )
            self._hand.add(FlowGroup(position, mine, time.monotonic()))
            specs += mine
        if specs:
            self._queue.enqueue(specs)

    def take(self, step: int, behind: Behind) -> Taken:
        """Waits for the groups of the step after `step`.

        Groups that a batch lacks are cancelled `rollouts.batch_timeout_s` seconds after it is
        waited for, or after they were admitted. Raises InfrastructureError when they do not end
        then either.
        """
        begun = time.monotonic()
        hand, stale = self._hand, 0
        while True:
            self.admit(step)
            if hand.running and len(hand.next_batch()) < self._config.training.tasks_per_step:
                self._wait(begun)
            elif too_old := self._stale(behind):
                stale += len(too_old)
                hand.drop(too_old)
                self._forget(too_old)
            else:
                break
        taken = hand.take()
        self._forget(taken)
        records = [record for group in taken for record in group.ordered]
        return Taken(records, len(taken), stale)

    def _next(self) -> int:
        if self._again:
            return self._again.pop(0)
        self.position += 1
        return self.position - 1

    def _wait(self, begun: float) -> None:
        hand = self._hand
        # In slices, so that the panel shows the queue and Ctrl-C is heard.
        self._look(SLICE_S, hand.fewest())
        self._watch()
        counts = self._queue.counts()
        self._progress.update(queue=counts.queued, running=counts.running)
        limit = self._config.rollouts.batch_timeout_s
        overdue = [
            group
            for group in hand.next_ended()
            if time.monotonic() > max(begun, group.admitted) + limit
        ]
        if not overdue:
            return
        left = [name for group in overdue for name in group.missing]
        hand.no_more_extra()
        self._queue.cancel(left)
        log.warning("cancelled what was unfinished of %s ...", left[0])
        self._look(CANCEL_S, len(left))
        if any(group.missing for group in overdue):
            raise InfrastructureError(
                f"{left[0]} did not end within {CANCEL_S:g} s after it was cancelled"
            )

    def _look(self, timeout_s: float, more: int) -> None:
        """Waits until `more` rollouts of running groups have ended; notes who has."""
        names = [spec.rollout_id for group in self._hand.running for spec in group.specs]
        known = sum(len(group.records) for group in self._hand.running)
        self._hand.ended(self._queue.wait(names, timeout_s, known + more))

    def _stale(self, behind: Behind) -> list[FlowGroup]:
        """Groups of the next batch with tokens that are too old to learn from."""
        staleness = self._config.training.staleness
        if not staleness:
            return []
        unknown = [group for group in self._hand.next_batch() if group.oldest is None]
        if unknown:
            found = self._oldest([record for group in unknown for record in group.ordered])
            for group in unknown:
                group.oldest = found.get(group.specs[0].group_id or "", {})
        return [
            group
            for group in self._hand.next_batch()
            if group.oldest and behind(group.oldest) > staleness
        ]

    def _forget(self, groups: Sequence[FlowGroup]) -> None:
        names = [spec.rollout_id for group in groups for spec in group.specs]
        if names:
            self._queue.forget(names)
