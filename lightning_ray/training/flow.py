"""Groups of rollouts on their way from the order of tasks to the learner.

A group is admitted when there is room for it, runs, is ready once all its rollouts have ended, and
is taken by a step. One number makes this synchronous or asynchronous. With `staleness` 0 a step's
groups are admitted when the step before has been learnt from; with more, so many steps' groups go
on being sampled while the learner learns and the weights change.

Room: what has been trained on and what is in hand together never exceed
(staleness + version + 1) x batch (Fu et al., 2025, AReaL, arXiv:2505.24298, equation 3; version
counts the steps trained). What is in hand is thus at most (staleness + 1) x batch.

Invariant: every position of the order below `position` is in hand, or was taken or dropped, once.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts import QueueClient, RolloutRecord, RolloutSpec
from lightning_ray.tracking import Progress
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.dynamic import has_contrast
from lightning_ray.training.order import TaskOrder
from lightning_ray.training.rolling import rollout_specs

log = logging.getLogger(__name__)

SLICE_S = 2.0
CANCEL_S = 60.0
"""How long rollouts that were cancelled may take to end, seconds."""


@dataclass
class FlowGroup:
    """The rollouts of one task."""

    position: int
    """Of its task in the order."""
    specs: Sequence[RolloutSpec]
    admitted: float = 0.0
    """When, on the monotonic clock."""
    records: dict[str, RolloutRecord] = field(default_factory=dict)
    """Of those that have ended, by rollout."""
    oldest: int | None = None
    """Version that sampled its oldest token; None for a group without tokens, and until `dated`."""
    dated: bool = False

    @property
    def missing(self) -> list[str]:
        """The rollouts that have not ended."""
        return [s.rollout_id for s in self.specs if s.rollout_id not in self.records]

    @property
    def ordered(self) -> list[RolloutRecord]:
        """The records of those that have ended, in the order of the samples."""
        found = (self.records.get(spec.rollout_id) for spec in self.specs)
        return [record for record in found if record is not None]


class Hand:
    """The groups in hand of a run; knows no queue and no clock."""

    def __init__(self, batch: int, staleness: int, steps: int, extra_rounds: int):
        """
        Args:
            batch: groups that a step trains on.
            staleness: most updates of the weights between a token and the step that learns from it.
            steps: the steps of the whole run: no more is admitted than they need.
            extra_rounds: the most batches of other tasks a step, in place of groups without
                contrast (dynamic sampling: DAPO, Yu et al., 2025, arXiv:2503.14476, section 3.2).
        """
        self._batch = batch
        self._staleness = staleness
        self._steps = steps
        self._most_extra = extra_rounds * batch
        self._extra = 0
        self.running: list[FlowGroup] = []
        self.ready: list[FlowGroup] = []
        """With all their rollouts ended, in the order in which they came to that."""
        self.flat: list[FlowGroup] = []
        """The ready ones of this step that others were admitted for."""

    @property
    def groups(self) -> list[FlowGroup]:
        """All in hand, in the order of their tasks."""
        return sorted([*self.running, *self.ready, *self.flat], key=lambda group: group.position)

    def room(self, step: int) -> int:
        """How many groups may be admitted when `step` steps have been trained."""
        most = min(self._staleness + 1, self._steps - step) * self._batch
        return max(most - len(self.running) - len(self.ready), 0)

    def add(self, group: FlowGroup) -> None:
        """A group is admitted."""
        self.running.append(group)

    def ended(self, records: Sequence[RolloutRecord]) -> None:
        """`records` are of all rollouts of running groups that have ended, also those known before:
        one that somebody has tried again is not among them.

        Makes room for others where a group turns out to teach nothing.
        """
        by_rollout = {record.spec.rollout_id: record for record in records}
        still = []
        for group in self.running:
            names = [spec.rollout_id for spec in group.specs]
            group.records = {name: by_rollout[name] for name in names if name in by_rollout}
            if group.missing:
                still.append(group)
            else:
                self._sort(group)
        self.running = still

    def fewest(self) -> int:
        """Rollouts that must end at least before a batch can be ready; 0 when nothing runs."""
        return sum(len(group.missing) for group in self.next_ended())

    def no_more_extra(self) -> None:
        """No other tasks are to be tried in this step."""
        self._extra = self._most_extra

    def next_ended(self) -> list[FlowGroup]:
        """The running groups that a batch lacks, those with the fewest missing rollouts."""
        lacking = max(self._batch - len(self.ready), 0)
        return sorted(self.running, key=lambda group: len(group.missing))[:lacking]

    def drop(self, groups: Sequence[FlowGroup]) -> None:
        """Ready groups are not to be trained on after all."""
        gone = {group.position for group in groups}
        self.ready = [group for group in self.ready if group.position not in gone]

    def take(self) -> list[FlowGroup]:
        """A step's groups, those without contrast among them, in the order of their tasks."""
        taken = [*self.ready[: self._batch], *self.flat]
        left, self.ready, self.flat = self.ready[self._batch :], [], []
        self._extra = 0
        for group in left:
            # Those for which no others could be tried in the step that is over.
            self._sort(group)
        return sorted(taken, key=lambda group: group.position)

    def _sort(self, group: FlowGroup) -> None:
        if self._extra < self._most_extra and not has_contrast(group.ordered):
            self._extra += 1
            self.flat.append(group)
        else:
            self.ready.append(group)

    def next_batch(self) -> list[FlowGroup]:
        """The ready groups that `take` would take."""
        return self.ready[: self._batch]


@dataclass(frozen=True)
class Taken:
    """What a step learns from."""

    records: list[RolloutRecord]
    """All ended, group by group, in the order of the tasks."""
    tasks: int
    stale: int
    """Groups that were dropped before it, because their tokens were too old."""


Oldest = Callable[[Sequence[RolloutRecord]], Mapping[str, int]]
"""The oldest version that sampled a token of each group, by group; of none for one without any."""


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

    def abandon(self) -> None:
        """Cancels all that is under way: another flow does it again."""
        groups = self._hand.groups
        names = [spec.rollout_id for group in groups for spec in group.specs]
        if not names:
            return
        self._queue.cancel(names)
        ended = self._queue.wait(names, CANCEL_S)
        if len(ended) < len(names):
            raise InfrastructureError(
                f"{len(names) - len(ended)} rollouts did not end within {CANCEL_S:g} s after they "
                "were cancelled"
            )
        self._forget(groups)

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

    def take(self, step: int, behind: Callable[[int], int]) -> Taken:
        """Waits for the groups of the step after `step`.

        `behind` says how many updates of the weights there were since a version. Groups that a
        batch lacks are cancelled `rollouts.batch_timeout_s` seconds after it is waited for, or
        after they were admitted. Raises InfrastructureError when they do not end then either.
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

    def _stale(self, behind: Callable[[int], int]) -> list[FlowGroup]:
        """Groups of the next batch with tokens that are too old to learn from."""
        staleness = self._config.training.staleness
        if not staleness:
            return []
        unknown = [group for group in self._hand.next_batch() if not group.dated]
        if unknown:
            found = self._oldest([record for group in unknown for record in group.ordered])
            for group in unknown:
                group.oldest, group.dated = found.get(group.specs[0].group_id or ""), True
        return [
            group
            for group in self._hand.next_batch()
            if group.oldest is not None and behind(group.oldest) > staleness
        ]

    def _forget(self, groups: Sequence[FlowGroup]) -> None:
        names = [spec.rollout_id for group in groups for spec in group.specs]
        if names:
            self._queue.forget(names)
