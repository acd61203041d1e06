from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_ray.rollouts.lifecycle import Lifecycle
from lightning_ray.rollouts.types import (
    AttemptOutcome,
    AttemptStatus,
    Identity,
    Lease,
    RolloutSpec,
    RolloutStatus,
)

GRACE_S = 5.0
REPORTED = [
    AttemptStatus.SUCCEEDED,
    AttemptStatus.FAILED,
    AttemptStatus.TIMED_OUT,
    AttemptStatus.UNRESPONSIVE,
    AttemptStatus.CANCELLED,
]
TRIED_AGAIN = {AttemptStatus.FAILED, AttemptStatus.TIMED_OUT, AttemptStatus.UNRESPONSIVE}


def spec(rollout_id: str, max_attempts: int = 2, timeout_s: float = 10.0) -> RolloutSpec:
    return RolloutSpec(rollout_id, "task", {"q": rollout_id}, timeout_s, max_attempts)


@dataclass
class Expected:
    """What the reference knows of one rollout."""

    spec: RolloutSpec
    status: RolloutStatus = RolloutStatus.QUEUED
    attempts: list[AttemptStatus] = field(default_factory=list)
    deadline: float = 0.0


class LifecycleAgainstReference(RuleBasedStateMachine):
    """The state machine beside a plain list-and-dictionary account of what should be so."""

    def __init__(self) -> None:
        super().__init__()
        self.lives = Lifecycle("run", GRACE_S)
        self.now = 0.0
        self.expected: dict[str, Expected] = {}
        self.queue: list[str] = []
        self.leases: list[Lease] = []

    @rule(batch=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), max_size=4))
    def enqueue(self, batch: list[tuple[int, int]]) -> None:
        """Some of the ids may have been asked for before, in this batch or an earlier one."""
        specs = [spec(f"r/{number}", attempts) for number, attempts in batch]
        new = 0
        for one in specs:
            if one.rollout_id not in self.expected:
                self.expected[one.rollout_id] = Expected(one)
                self.queue.append(one.rollout_id)
                new += 1
        assert self.lives.enqueue(specs) == new

    @rule()
    def dequeue(self) -> None:
        lease = self.lives.dequeue(self.now)
        if not self.queue:
            assert lease is None
            return
        rollout = self.expected[self.queue.pop(0)]
        assert lease is not None
        assert lease.rollout_id == rollout.spec.rollout_id and lease.task == rollout.spec.task
        rollout.attempts.append(AttemptStatus.RUNNING)
        rollout.status = RolloutStatus.RUNNING
        rollout.deadline = self.now + rollout.spec.timeout_s + GRACE_S
        assert lease.number == len(rollout.attempts)
        assert lease.attempt_id == f"{lease.rollout_id}/{lease.number}"
        assert lease.attempt_id not in {other.attempt_id for other in self.leases}
        assert lease.capability not in {other.capability for other in self.leases}
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), status=st.sampled_from(REPORTED))
    def finish(self, data: st.DataObject, status: AttemptStatus) -> None:
        """Any attempt may be reported, at any time and again; only a running one counts."""
        lease = data.draw(st.sampled_from(self.leases))
        counts = self.is_running(lease)
        before = self.lives.record(lease.rollout_id)
        assert self.lives.finish(lease.attempt_id, AttemptOutcome(status)) is counts
        if counts:
            self.end(lease.rollout_id, status)
        else:
            assert self.lives.record(lease.rollout_id) == before

    @rule(numbers=st.lists(st.integers(0, 11), max_size=3))
    def cancel(self, numbers: list[int]) -> None:
        stopping = []
        for number in numbers:
            rollout = self.expected.get(f"r/{number}")
            if rollout is None or rollout.status.ended:
                continue
            if rollout.status is RolloutStatus.RUNNING:
                stopping.append(f"r/{number}/{len(rollout.attempts)}")
                rollout.attempts[-1] = AttemptStatus.CANCELLED
            else:
                self.queue.remove(f"r/{number}")
            rollout.status = RolloutStatus.CANCELLED
        assert self.lives.cancel([f"r/{number}" for number in numbers]) == stopping

    @rule(seconds=st.sampled_from([0.0, 1.0, 14.0, 15.0, 15.5]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        overdue = [
            (rollout_id, f"{rollout_id}/{len(rollout.attempts)}")
            for rollout_id, rollout in self.expected.items()
            if rollout.status is RolloutStatus.RUNNING and rollout.deadline < self.now
        ]
        assert self.lives.expire(self.now) == [attempt_id for _, attempt_id in overdue]
        for rollout_id, _ in overdue:
            self.end(rollout_id, AttemptStatus.UNRESPONSIVE)

    @rule(numbers=st.lists(st.integers(0, 9), max_size=2))
    def forget(self, numbers: list[int]) -> None:
        """Only what ended is forgotten; here its id is not used again."""
        self.lives.forget([f"r/{n}" for n in numbers if not self.has_ended(f"r/{n}")])

    def has_ended(self, rollout_id: str) -> bool:
        return rollout_id in self.expected and self.expected[rollout_id].status.ended

    def is_running(self, lease: Lease) -> bool:
        rollout = self.expected[lease.rollout_id]
        return rollout.status is RolloutStatus.RUNNING and lease.number == len(rollout.attempts)

    def end(self, rollout_id: str, status: AttemptStatus) -> None:
        rollout = self.expected[rollout_id]
        rollout.attempts[-1] = status
        if status not in TRIED_AGAIN:
            rollout.status = RolloutStatus(status.value)
        elif len(rollout.attempts) == rollout.spec.max_attempts:
            rollout.status = RolloutStatus.FAILED
        else:
            rollout.status = RolloutStatus.QUEUED
            self.queue.append(rollout_id)

    @invariant()
    def rollouts_stand_as_expected(self) -> None:
        for rollout_id, rollout in self.expected.items():
            record = self.lives.record(rollout_id)
            assert record.status is rollout.status
            assert [status for _, status in record.attempts] == rollout.attempts
            assert len(record.attempts) <= rollout.spec.max_attempts
            assert self.lives.ended(rollout_id) is rollout.status.ended
            running = [status is AttemptStatus.RUNNING for _, status in record.attempts]
            assert sum(running) == (rollout.status is RolloutStatus.RUNNING)

    @invariant()
    def a_capability_opens_while_its_attempt_is_the_running_one(self) -> None:
        for lease in self.leases:
            whom = Identity("run", lease.rollout_id, lease.attempt_id)
            assert self.lives.resolve(lease.capability) == (
                whom if self.is_running(lease) else None
            )

    @invariant()
    def the_counts_add_up(self) -> None:
        counts = self.lives.counts()
        for status in RolloutStatus:
            found = [rollout.status for rollout in self.expected.values()].count(status)
            assert getattr(counts, status.value) == found
        assert counts.attempts == len(self.leases)


LifecycleAgainstReference.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
test_lifecycle_against_a_reference = LifecycleAgainstReference.TestCase


def test_an_ended_rollout_can_be_forgotten_and_an_unfinished_one_cannot() -> None:
    lives = Lifecycle("run", GRACE_S)
    lives.enqueue([spec("a"), spec("b")])
    lease = lives.dequeue(0.0)
    assert lease is not None
    lives.forget(["a", "b", "unknown"])
    assert lives.finish(lease.attempt_id, AttemptOutcome(AttemptStatus.SUCCEEDED))
    lives.forget(["a"])
    with pytest.raises(KeyError):
        lives.record("a")
    assert not lives.finish(lease.attempt_id, AttemptOutcome(AttemptStatus.SUCCEEDED))
    assert lives.record("b").status is RolloutStatus.QUEUED


def test_a_late_report_of_an_earlier_attempt_does_not_decide_the_rollout() -> None:
    lives = Lifecycle("run", GRACE_S)
    lives.enqueue([spec("a")])
    first = lives.dequeue(0.0)
    assert first is not None and lives.expire(15.1) == [first.attempt_id]
    second = lives.dequeue(16.0)
    assert second is not None
    assert not lives.finish(
        first.attempt_id, AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})
    )
    assert lives.finish(second.attempt_id, AttemptOutcome(AttemptStatus.FAILED))
    record = lives.record("a")
    assert record.status is RolloutStatus.FAILED and record.attempt_id == second.attempt_id
    assert record.outcome is not None and record.outcome.rewards == {}


@pytest.mark.parametrize("guess", ["", "guess", "a/1"])
def test_an_unknown_capability_is_nobody(guess: str) -> None:
    lives = Lifecycle("run", GRACE_S)
    lives.enqueue([spec("a")])
    lease = lives.dequeue(0.0)
    assert lease is not None
    assert lives.resolve(guess) is None and lives.resolve(lease.capability[:-1]) is None


@pytest.mark.parametrize("end", ["finish", "cancel", "expire"])
def test_an_attempt_that_ended_may_tell_for_a_while_and_call_no_more(end: str) -> None:
    lives = Lifecycle("run", GRACE_S, linger_s=30.0)
    lives.enqueue([spec("a", max_attempts=1)])
    lease = lives.dequeue(0.0)
    assert lease is not None
    identity = lives.resolve(lease.capability)
    assert identity is not None and lives.resolve(lease.capability, telling=True) == identity
    now = 5.0
    if end == "finish":
        assert lives.finish(lease.attempt_id, AttemptOutcome(AttemptStatus.SUCCEEDED))
    elif end == "cancel":
        lives.cancel(["a"])
    else:
        now = 10.0 + GRACE_S + 1
        assert lives.expire(now) == [lease.attempt_id]
    lives.forget(["a"])
    assert lives.resolve(lease.capability) is None
    for later in (now, now + 29, now + 30):
        lives.expire(later)
        assert lives.resolve(lease.capability, telling=True) == identity
    lives.expire(now + 31)
    assert lives.resolve(lease.capability, telling=True) is None
    assert not lives._closed and not lives._until and not lives._closing
