import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_ray.rollouts.capabilities import digest
from lightning_ray.rollouts.lifecycle import Lifecycle
from lightning_ray.rollouts.roster import NOWHERE, WIDTH, Roster, RosterReader
from lightning_ray.rollouts.types import (
    RETRIED,
    AttemptOutcome,
    AttemptStatus,
    Identity,
    Lease,
    RolloutSpec,
    RolloutStatus,
)
from lightning_ray.rollouts.wire import decode, encode

GRACE_S = 5.0
REPORTED = [
    AttemptStatus.SUCCEEDED,
    AttemptStatus.FAILED,
    AttemptStatus.TIMED_OUT,
    AttemptStatus.CANCELLED,
]


def spec(rollout_id: str, max_attempts: int = 2, timeout_s: float = 10.0) -> RolloutSpec:
    return RolloutSpec(rollout_id, "task", {"q": rollout_id}, timeout_s, max_attempts)


@dataclass
class Try:
    """What the reference knows of one attempt."""

    name: str
    status: AttemptStatus = AttemptStatus.RUNNING
    deadline: float = 0.0
    heard: float = 0.0
    worker: str = ""
    fault: bool = False
    open: bool = True
    """Whether its agent may go on."""


@dataclass
class Expected:
    """What the reference knows of one rollout."""

    spec: RolloutSpec
    status: RolloutStatus = RolloutStatus.QUEUED
    attempts: list[Try] = field(default_factory=list)
    since_retry: int = 0
    """Where the attempts begin that were made since somebody retried it."""


class LifecycleAgainstReference(RuleBasedStateMachine):
    """The state machine beside a plain list-and-dictionary account of what should be so."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.lives = Lifecycle("run", GRACE_S)
        self.lives.show(Roster(self.path))
        self.seen = RosterReader(self.path)
        self.history: list[bytes] = []
        self.now = 0.0
        self.expected: dict[str, Expected] = {}
        self.queue: list[str] = []
        self.leases: list[Lease] = []
        self.requests: list[str] = []

    @property
    def path(self) -> Path:
        return Path(self.folder.name) / "running"

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(
        batch=st.lists(
            st.tuples(
                st.integers(0, 9),
                st.integers(1, 3),
                st.integers(0, 2),
                st.sampled_from([0.0, 6.0]),
                st.sampled_from([RETRIED, RETRIED[1:]]),
                st.integers(0, 2),
            ),
            max_size=4,
        )
    )
    def enqueue(self, batch: list[tuple[int, int, int, float, Any, int]]) -> None:
        """Some of the ids may have been asked for before, in this batch or an earlier one."""
        specs = [
            replace(
                spec(f"r/{number}", attempts),
                priority=priority,
                silence_s=silence,
                retry_on=retry_on,
                max_faults=faults,
            )
            for number, attempts, priority, silence, retry_on, faults in batch
        ]
        new = 0
        for one in specs:
            if one.rollout_id not in self.expected:
                self.expected[one.rollout_id] = Expected(one)
                self.queue.append(one.rollout_id)
                new += 1
        assert self.lives.enqueue(specs, self.now) == new

    @rule(worker=st.sampled_from(["", "w1", "w2"]))
    def dequeue(self, worker: str) -> None:
        request = f"secret {len(self.requests)}"
        lease = self.lives.dequeue(self.now, request, worker)
        if not self.queue:
            assert lease is None
            return
        # The first of those of the highest priority.
        name = max(self.queue, key=lambda name: self.expected[name].spec.priority)
        self.queue.remove(name)
        rollout = self.expected[name]
        assert lease is not None
        assert lease.rollout_id == name and lease.task == rollout.spec.task
        if rollout.attempts:
            rollout.attempts[-1].open = False
        deadline = self.now + rollout.spec.timeout_s + GRACE_S
        number = len(rollout.attempts) + 1
        rollout.attempts.append(
            Try(f"{name}/{number}", deadline=deadline, heard=self.now, worker=worker)
        )
        rollout.status = RolloutStatus.RUNNING
        assert (lease.number, lease.attempt_id) == (number, f"{name}/{number}")
        assert lease.attempt_id not in {other.attempt_id for other in self.leases}
        assert lease.capability not in {other.capability for other in self.leases}
        self.leases.append(lease)
        self.requests.append(request)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def dequeue_again(self, data: st.DataObject) -> None:
        """The same request gets the same lease for as long as its attempt may go on."""
        number = data.draw(st.integers(0, len(self.leases) - 1))
        rollout, attempt = self.of(self.leases[number])
        if attempt is rollout.attempts[-1] and attempt.open:
            assert self.lives.dequeue(self.now, self.requests[number]) == self.leases[number]

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), status=st.sampled_from(REPORTED), fault=st.booleans())
    def finish(self, data: st.DataObject, status: AttemptStatus, fault: bool) -> None:
        """Any attempt may be reported, at any time and again; only the latest one may count."""
        fault = fault and status is AttemptStatus.FAILED
        lease = data.draw(st.sampled_from(self.leases))
        rollout, attempt = self.of(lease)
        # That its worker stopped it, because it is to be tried again, is no outcome.
        counts = attempt.status is AttemptStatus.RUNNING or (
            self.replaceable(rollout, attempt) and status is not AttemptStatus.CANCELLED
        )
        before = self.lives.record(lease.rollout_id)
        outcome = AttemptOutcome(status, fault=fault)
        assert self.lives.finish(lease.attempt_id, outcome, self.now) is counts
        if counts:
            attempt.open = False
            self.end(rollout, status, fault)
            assert self.lives.record(lease.rollout_id).outcome == outcome
        else:
            assert self.lives.record(lease.rollout_id) == before

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def heard(self, data: st.DataObject) -> None:
        leases = data.draw(
            st.lists(st.sampled_from(self.leases), max_size=3, unique_by=lambda one: one.attempt_id)
        )
        revived = []
        for lease in leases:
            rollout, attempt = self.of(lease)
            if attempt is not rollout.attempts[-1]:
                continue
            attempt.heard = self.now
            if attempt.open and attempt.status is AttemptStatus.UNRESPONSIVE:
                attempt.status = AttemptStatus.RUNNING
                rollout.status = RolloutStatus.RUNNING
                self.queue.remove(lease.rollout_id)
                revived.append(lease.attempt_id)
        names = [lease.attempt_id for lease in leases]
        assert self.lives.heard([*names, "unknown/1", ""], self.now) == revived

    @rule(numbers=st.lists(st.integers(0, 11), max_size=3))
    def cancel(self, numbers: list[int]) -> None:
        stopping = []
        for number in numbers:
            rollout = self.expected.get(f"r/{number}")
            if rollout is None or rollout.status.ended:
                continue
            if rollout.attempts and rollout.attempts[-1].open:
                stopping.append(rollout.attempts[-1].name)
                rollout.attempts[-1].status = AttemptStatus.CANCELLED
                rollout.attempts[-1].open = False
            if rollout.status is RolloutStatus.QUEUED:
                self.queue.remove(f"r/{number}")
            rollout.status = RolloutStatus.CANCELLED
        assert self.lives.cancel([f"r/{number}" for number in numbers], self.now) == stopping

    @rule(numbers=st.lists(st.integers(0, 11), max_size=2, unique=True))
    def retry(self, numbers: list[int]) -> None:
        names = [f"r/{number}" for number in numbers if self.has_ended(f"r/{number}")]
        for name in names:
            rollout = self.expected[name]
            rollout.status = RolloutStatus.QUEUED
            rollout.since_retry = len(rollout.attempts)
            self.queue.append(name)
        assert self.lives.retry([f"r/{number}" for number in numbers], self.now) == names

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def lose(self, worker: str) -> None:
        lost = []
        for rollout in sorted(self.expected.values(), key=lambda r: r.spec.rollout_id):
            if rollout.attempts and rollout.attempts[-1].open:
                attempt = rollout.attempts[-1]
                if attempt.worker == worker:
                    lost.append((attempt.name, rollout))
        assert self.lives.lose(worker, self.now) == sorted(name for name, _ in lost)
        for _, rollout in sorted(lost, key=lambda one: one[0]):
            rollout.attempts[-1].open = False
            self.end(rollout, AttemptStatus.UNRESPONSIVE, fault=True)

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0, 6.5, 14.0, 15.0, 15.5]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = []
        for rollout in self.expected.values():
            if not rollout.attempts or not rollout.attempts[-1].open:
                continue
            attempt = rollout.attempts[-1]
            if attempt.deadline < self.now:
                due.append((attempt.deadline, attempt.name, "overdue", rollout))
            silent_at = attempt.heard + rollout.spec.silence_s
            running = attempt.status is AttemptStatus.RUNNING
            if rollout.spec.silence_s and running and silent_at < self.now:
                due.append((silent_at, attempt.name, "silent", rollout))
        expired = self.lives.expire(self.now)
        found: dict[str, list[str]] = {"silent": [], "overdue": []}
        for name in [*expired.silent, *expired.overdue]:
            assert self.lives.record(name.rpartition("/")[0]).attempt_id == name
        # What was silent before it was overdue is both, unless its rollout ended of the silence.
        for _, name, why, rollout in sorted(due, key=lambda one: (one[0], one[1])):
            attempt = rollout.attempts[-1]
            if not attempt.open:
                continue
            found[why].append(name)
            if why == "overdue":
                attempt.open = False
                if attempt.status is AttemptStatus.RUNNING:
                    self.end(rollout, AttemptStatus.UNRESPONSIVE)
            elif attempt.status is AttemptStatus.RUNNING:
                self.end(rollout, AttemptStatus.UNRESPONSIVE)
                if rollout.status.ended:
                    attempt.open = False
        assert sorted(expired.silent) == sorted(found["silent"])
        assert sorted(expired.overdue) == sorted(found["overdue"])

    @rule()
    def restart_by_replay(self) -> None:
        """What was written of each change makes the same state again."""
        self.history += map(encode, self.lives.events)
        self.lives = Lifecycle("run", GRACE_S)
        for line in self.history:
            event = decode(line)
            assert encode(event) == line
            self.lives.apply(event)
        self.lives.show(Roster(self.path))
        # What was heard is not written down: who starts again has heard of everybody.
        self.lives.heard_all(self.now)
        for rollout in self.expected.values():
            if rollout.attempts and rollout.attempts[-1].open:
                rollout.attempts[-1].heard = self.now

    @rule()
    def restart_from_a_snapshot(self) -> None:
        """So does a snapshot of it."""
        self.history = [encode(event) for event in self.lives.snapshot()]
        self.lives.events.clear()
        self.restart_by_replay()

    @rule(numbers=st.lists(st.integers(0, 9), max_size=2))
    def forget(self, numbers: list[int]) -> None:
        """Only what ended is forgotten; here its id is not used again."""
        self.lives.forget([f"r/{n}" for n in numbers if not self.has_ended(f"r/{n}")], self.now)

    def has_ended(self, rollout_id: str) -> bool:
        return rollout_id in self.expected and self.expected[rollout_id].status.ended

    def of(self, lease: Lease) -> tuple[Expected, Try]:
        rollout = self.expected[lease.rollout_id]
        return rollout, rollout.attempts[lease.number - 1]

    def replaceable(self, rollout: Expected, attempt: Try) -> bool:
        """Unresponsive, but nobody was given another attempt, nor did anybody ask for one."""
        return (
            attempt is rollout.attempts[-1]
            and attempt.status is AttemptStatus.UNRESPONSIVE
            and rollout.status is RolloutStatus.QUEUED
            and rollout.since_retry < len(rollout.attempts)
        )

    def end(self, rollout: Expected, status: AttemptStatus, fault: bool = False) -> None:
        name = rollout.spec.rollout_id
        if name in self.queue:
            self.queue.remove(name)
        rollout.attempts[-1].status, rollout.attempts[-1].fault = status, fault
        spoilt = sum(attempt.fault for attempt in rollout.attempts[rollout.since_retry :])
        used = len(rollout.attempts) - rollout.since_retry - spoilt
        if status in (AttemptStatus.SUCCEEDED, AttemptStatus.CANCELLED):
            rollout.status = RolloutStatus(status.value)
            return
        if fault:
            again = spoilt <= rollout.spec.max_faults
        else:
            again = used < rollout.spec.max_attempts and status in rollout.spec.retry_on
        rollout.status = RolloutStatus.QUEUED if again else RolloutStatus.FAILED
        if again:
            self.queue.append(name)

    @invariant()
    def rollouts_stand_as_expected(self) -> None:
        for rollout_id, rollout in self.expected.items():
            record = self.lives.record(rollout_id)
            assert record.status is rollout.status
            assert [status for _, status in record.attempts] == [
                attempt.status for attempt in rollout.attempts
            ]
            assert self.lives.ended(rollout_id) is rollout.status.ended
            running = [status is AttemptStatus.RUNNING for _, status in record.attempts]
            assert sum(running) == (rollout.status is RolloutStatus.RUNNING)
            assert record.faulted is self.faulted(rollout)
            if record.faulted:
                assert record.outcome is not None and record.outcome.rewards == {}

    def faulted(self, rollout: Expected) -> bool:
        return rollout.status is RolloutStatus.FAILED and rollout.attempts[-1].fault

    @invariant()
    def a_capability_opens_while_its_attempt_may_be_heard(self) -> None:
        for lease in self.leases:
            rollout, attempt = self.of(lease)
            assert not attempt.open or attempt is rollout.attempts[-1]
            whom = Identity("run", lease.rollout_id, lease.attempt_id)
            assert self.lives.resolve(lease.capability) == (whom if attempt.open else None)
            assert self.lives.live(lease.attempt_id) is attempt.open

    @invariant()
    def the_roster_has_those_whose_capability_opens_and_nobody_else(self) -> None:
        taken = self.path.read_bytes()[: 1000 * WIDTH]
        for lease in self.leases:
            whom, hashed = self.lives.resolve(lease.capability), digest(lease.capability)
            assert whom is None or self.seen.sits(whom.seat, hashed)
            assert not self.seen.sits(NOWHERE, hashed)
            assert taken.count(hashed[:WIDTH]) == (whom is not None)

    @invariant()
    def the_counts_add_up(self) -> None:
        counts = self.lives.counts()
        for status in RolloutStatus:
            found = [rollout.status for rollout in self.expected.values()].count(status)
            assert getattr(counts, status.value) == found
        assert counts.attempts == len(self.leases)
        assert counts.faulted == sum(map(self.faulted, self.expected.values()))
        held = [r.attempts[-1].worker for r in self.expected.values() if r.attempts]
        opened = [r.attempts[-1].open for r in self.expected.values() if r.attempts]
        for worker in ("", "w1", "w2"):
            number = sum(w == worker and o for w, o in zip(held, opened, strict=True))
            assert self.lives.held().get(worker, 0) == number


LifecycleAgainstReference.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
test_lifecycle_against_a_reference = LifecycleAgainstReference.TestCase
