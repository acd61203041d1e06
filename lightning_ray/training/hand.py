"""The groups in hand of a run, and how many more there may be; knows no queue and no clock.

Invariant: what has been trained on and what is in hand together never exceed
(staleness + version + 1) x batch (Fu et al., 2025, AReaL, arXiv:2505.24298, equation 3; version
counts the steps trained). What is in hand is thus at most (staleness + 1) x batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_ray.rollouts import RolloutRecord, RolloutSpec
from lightning_ray.training.dynamic import has_contrast


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
    oldest: Mapping[str, int] | None = None
    """By policy, the version that sampled its oldest token in the group; None until it is known."""

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
    """Groups that run, that are ready, and that others were admitted for."""

    def __init__(
        self,
        batch: int,
        staleness: int,
        steps: int,
        extra_rounds: int,
        past_the_end: bool = False,
    ):
        """
        Args:
            batch: groups that a step trains on.
            staleness: most updates of the weights between a token and the step that learns from it.
            steps: the steps of the whole run.
            extra_rounds: the most batches of other tasks a step, in place of groups without
                contrast (dynamic sampling: DAPO, Yu et al., 2025, arXiv:2503.14476, section 3.2).
            past_the_end: as many are in hand in the last steps as in any other, so that these do
                not wait for the slowest of all; else no more is admitted than the steps need.
        """
        self._batch = batch
        self._staleness = staleness
        self._steps = steps
        self._past_the_end = past_the_end
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
        left = self._steps - step
        steps = self._staleness + 1
        if not self._past_the_end or left <= 0:
            steps = min(steps, left)
        most = steps * self._batch
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
