"""The life of rollouts, as a state machine without clocks, processes or network.

Invariants: each dequeue makes a new attempt and gives it to one caller; only the latest attempt
decides its rollout; a rollout that ended stays as it ended, unless somebody retries it; a
capability opens the gateway while its attempt is the latest one and may still be heard, and never
again, but for what the attempt still has to tell: that is taken for `linger_s` seconds more.

Every method first decides, then makes one event of each change and applies it. The events are the
whole history: `apply`, given them again in their order, makes the same state. `now` is a number of
seconds that the caller takes from one clock and that never goes back.
"""

import secrets
from collections import OrderedDict
from collections.abc import Iterable
from heapq import heappop, heappush

from lightning_ray.rollouts.capabilities import Capabilities, capability_of, digest
from lightning_ray.rollouts.lives import (
    Attempt,
    Counts,
    Due,
    Event,
    Expired,
    Life,
    Ready,
    Tally,
    suspended,
)
from lightning_ray.rollouts.roster import Roster
from lightning_ray.rollouts.types import (
    AttemptOutcome,
    AttemptRecord,
    AttemptStatus,
    Identity,
    Lease,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
)
from lightning_ray.spans import attempt_id_of

LOST = AttemptOutcome(AttemptStatus.UNRESPONSIVE, error="its worker was lost", fault=True)
OVERDUE = AttemptOutcome(AttemptStatus.UNRESPONSIVE, error="its worker did not report in time")


class Lifecycle:
    """The rollouts of one run."""

    def __init__(self, run_id: str, grace_s: float, linger_s: float = 0.0):
        """`grace_s`: an attempt not reported this long after its timeout is unresponsive.

        `linger_s`: so long after its end an attempt's telemetry is still taken.
        """
        self.events: list[Event] = []
        """What has changed, oldest first; whoever keeps it takes it from here."""
        self.past: list[Life] = []
        """Rollouts that were forgotten; whoever keeps them takes them from here."""
        self._run_id = run_id
        self._grace_s = grace_s
        self._now = float("-inf")
        self._rollouts: OrderedDict[str, Life] = OrderedDict()
        self._queue: list[Ready] = []
        self._tickets = 0
        self._due: list[Due] = []
        self._capabilities = Capabilities(run_id, linger_s)
        self._tally = Tally()

    def show(self, roster: Roster) -> None:
        """From now on attempts that run are also seen in a roster, which is empty."""
        self._capabilities.show(roster)

    # What is asked of it

    def enqueue(self, specs: Iterable[RolloutSpec], now: float | None = None) -> int:
        """Queues rollouts in their order, but those that are known; returns how many were new."""
        new = 0
        for spec in specs:
            if spec.rollout_id not in self._rollouts:
                self._do("enqueue", now, spec.rollout_id, spec)
                new += 1
        return new

    def dequeue(self, now: float, request: str = "", worker: str = "") -> Lease | None:
        """Makes the next attempt, or returns None when nothing is queued.

        `request` is a secret of the caller's: the same one gets the same lease again while its
        attempt lives. `worker` is who will run it, so that it can be lost with it.
        """
        if request and (again := self._leased(request)) is not None:
            return again
        request = request or secrets.token_urlsafe(24)
        while self._queue:
            ready = heappop(self._queue)
            life = self._rollouts.get(ready.rollout_id)
            if life is not None and life.ticket == ready.ticket:
                attempt_id = attempt_id_of(ready.rollout_id, len(life.attempts) + 1)
                capability = capability_of(request, attempt_id)
                self._do("begin", now, attempt_id, digest(capability), worker, digest(request))
                return life.lease(self._run_id, capability)
        return None

    def finish(self, attempt_id: str, outcome: AttemptOutcome, now: float | None = None) -> bool:
        """Takes a worker's report. Returns False, and changes nothing, when it comes too late.

        Late is: for an attempt that has been reported or cancelled, or whose rollout has a newer
        one. An unresponsive attempt that nobody replaced is not late.
        """
        found = self._latest(attempt_id)
        if found is None or not (found[1].status is AttemptStatus.RUNNING or suspended(*found)):
            return False
        if outcome.status is AttemptStatus.CANCELLED and suspended(*found):
            # Its worker lives after all, and stopped the agent because it was to be tried again.
            return False
        self._do("end", now, attempt_id, outcome)
        return True

    def heard(self, attempt_ids: Iterable[str], now: float) -> list[str]:
        """Notes that there were spans of these attempts; returns those that it revived."""
        revived = []
        for attempt_id in attempt_ids:
            found = self._latest(attempt_id)
            if found is None:
                continue
            life, attempt = found
            attempt.heard = max(attempt.heard, now)
            if suspended(life, attempt) and self._capabilities.is_open(attempt):
                self._do("revive", now, attempt_id)
                revived.append(attempt_id)
        return revived

    def heard_all(self, now: float) -> None:
        """As if a span of every attempt had come: for who could not listen for a while."""
        for attempt_id in self._capabilities.all_held():
            if (found := self._latest(attempt_id)) is not None:
                found[1].heard = max(found[1].heard, now)

    def cancel(self, rollout_ids: Iterable[str], now: float | None = None) -> list[str]:
        """Cancels rollouts that have not ended; returns the attempts whose agents must stop."""
        stopping = []
        for rollout_id in rollout_ids:
            life = self._rollouts.get(rollout_id)
            if life is None or life.status.ended:
                continue
            if life.attempts and self._capabilities.is_open(life.attempts[-1]):
                stopping.append(life.attempts[-1].attempt_id)
            self._do("cancel", now, rollout_id)
        return stopping

    def retry(self, rollout_ids: Iterable[str], now: float | None = None) -> list[str]:
        """Queues ended rollouts again, with all their attempts; returns those that had ended."""
        queued = []
        for rollout_id in rollout_ids:
            life = self._rollouts.get(rollout_id)
            if life is not None and life.status.ended:
                self._do("retry", now, rollout_id)
                queued.append(rollout_id)
        return queued

    def lose(self, worker: str, now: float) -> list[str]:
        """Ends what a lost worker ran, as faults; returns the attempts."""
        lost = []
        for attempt_id in self._capabilities.held_by(worker):
            found = self._latest(attempt_id)
            if found is not None and self._capabilities.is_open(found[1]):
                self._do("lost", now, attempt_id)
                lost.append(attempt_id)
        return lost

    def expire(self, now: float) -> Expired:
        """Ends the attempts that were silent for too long or whose worker is overdue."""
        silent, overdue = [], []
        while self._due and self._due[0].at < now:
            due = heappop(self._due)
            found = self._latest(due.attempt_id)
            if found is None or not self._capabilities.is_open(found[1]):
                continue
            life, attempt = found
            if not due.silence:
                self._do("overdue", now, due.attempt_id)
                overdue.append(due.attempt_id)
            elif attempt.heard + life.spec.silence_s >= now:
                self._watch(life, attempt)
            elif attempt.status is AttemptStatus.RUNNING:
                self._do("silent", now, due.attempt_id)
                silent.append(due.attempt_id)
        self._capabilities.expire(now)
        return Expired(silent, overdue)

    def forget(self, rollout_ids: Iterable[str], now: float | None = None) -> None:
        """Drops rollouts that ended from memory; their spans stay in the store."""
        for rollout_id in rollout_ids:
            life = self._rollouts.get(rollout_id)
            if life is not None and life.status.ended:
                self._do("forget", now, rollout_id)

    # What can be known

    def resolve(self, capability: str, telling: bool = False) -> Identity | None:
        """Whom a capability stands for, or None when it is unknown or its attempt has ended.

        `telling`: for telemetry and rewards, which an attempt may send until a while after its end.
        """
        return self._capabilities.resolve(capability, telling)

    def record(self, rollout_id: str) -> RolloutRecord:
        """The rollout as it stands. Raises KeyError for an unknown id."""
        return self._rollouts[rollout_id].record()

    def attempts(self, rollout_id: str) -> list[AttemptRecord]:
        """Its attempts, oldest first. Raises KeyError for an unknown id."""
        return self._rollouts[rollout_id].history()

    def ended(self, rollout_id: str) -> bool:
        """Whether no further attempt will be made. Raises KeyError for an unknown id."""
        return self._rollouts[rollout_id].status.ended

    def known(self, rollout_id: str) -> bool:
        """Whether a rollout is remembered."""
        return rollout_id in self._rollouts

    def live(self, attempt_id: str) -> bool:
        """Whether an attempt's agent may go on."""
        found = self._latest(attempt_id)
        return found is not None and self._capabilities.is_open(found[1])

    def running(self) -> Iterable[str]:
        """Every attempt that a worker holds."""
        return self._capabilities.all_held()

    def held(self) -> dict[str, int]:
        """How many attempts each worker runs."""
        return self._capabilities.held()

    def counts(self) -> Counts:
        """How many rollouts stand where, of those that are remembered."""
        return self._tally.counts()

    def lives(self) -> Iterable[Life]:
        """Every rollout that is remembered, in the order of arrival."""
        return self._rollouts.values()

    def snapshot(self) -> list[Event]:
        """Events that make this state of nothing, but for what only lingers."""
        made: list[Event] = [("tally", self._now, "", self._tally.attempts)]
        return made + [("restore", self._now, name, life) for name, life in self._rollouts.items()]

    @property
    def now(self) -> float:
        """The latest time of an event; minus infinity before the first."""
        return self._now

    # What changes it

    def apply(self, event: Event) -> None:
        """Makes one change that was decided before. Raises KeyError for one that cannot be."""
        kind, now, name, *rest = event
        self._now = max(self._now, now)
        if kind == "enqueue":
            self._rollouts[name] = life = Life(rest[0])
            self._tally.add(life)
            self._place(life)
        elif kind == "restore":
            self._restore(rest[0])
        elif kind == "tally":
            self._tally.attempts = rest[0]
        elif kind == "begin":
            self._begin(self._rollouts[name.rpartition("/")[0]], name, now, *rest)
        elif kind in ("cancel", "retry", "forget"):
            getattr(self, f"_{kind}")(self._rollouts[name], now)
        else:
            life = self._rollouts[name.rpartition("/")[0]]
            attempt = life.attempts[-1]
            if kind == "revive":
                self._revive(life, attempt)
            elif kind == "silent":
                silence = f"no span for {life.spec.silence_s:g} s"
                self._end(
                    life, attempt, AttemptOutcome(AttemptStatus.UNRESPONSIVE, error=silence), now
                )
                if life.status.ended:
                    self._capabilities.close(attempt, now)
            else:
                self._capabilities.close(attempt, now)
                # One that fell silent before is unresponsive already.
                if kind != "overdue" or attempt.status is AttemptStatus.RUNNING:
                    outcome = {"lost": LOST, "overdue": OVERDUE}.get(kind) or rest[0]
                    self._take_back(life, attempt)
                    self._end(life, attempt, outcome, now)

    def _do(self, kind: str, now: float | None, name: str, *rest: object) -> None:
        event = (kind, self._now if now is None else now, name, *rest)
        self.apply(event)
        self.events.append(event)

    def _begin(
        self, life: Life, attempt_id: str, now: float, digest: bytes, worker: str, request: bytes
    ) -> None:
        spec = life.spec
        if life.attempts:
            # Whatever it still does, it is replaced.
            self._capabilities.close(life.attempts[-1], now)
        deadline = now + spec.timeout_s + self._grace_s
        attempt = Attempt(attempt_id, digest, deadline, worker, request, now, heard=now)
        life.attempts.append(attempt)
        life.ticket = -1
        self._tally.attempts += 1
        self._tally.move(life, RolloutStatus.RUNNING)
        self._admit(life, attempt)

    def _admit(self, life: Life, attempt: Attempt) -> None:
        self._capabilities.open(attempt, life.spec)
        heappush(self._due, Due(attempt.deadline, attempt.attempt_id, silence=False))
        if attempt.status is AttemptStatus.RUNNING:
            self._watch(life, attempt)

    def _watch(self, life: Life, attempt: Attempt) -> None:
        if life.spec.silence_s > 0:
            at = attempt.heard + life.spec.silence_s
            heappush(self._due, Due(at, attempt.attempt_id, silence=True))

    def _end(self, life: Life, attempt: Attempt, outcome: AttemptOutcome, now: float) -> None:
        attempt.status, attempt.outcome, attempt.ended = outcome.status, outcome, now
        life.outcome = outcome
        # Only a live entry of the queue has the rollout's ticket.
        life.ticket = -1
        if outcome.status in (AttemptStatus.SUCCEEDED, AttemptStatus.CANCELLED):
            self._tally.move(life, RolloutStatus(outcome.status.value))
            return
        if outcome.fault:
            life.faults += 1
            again = life.faults <= life.spec.max_faults
        else:
            life.tries += 1
            again = life.tries < life.spec.max_attempts and outcome.status in life.spec.retry_on
        if again:
            self._place(life)
            self._tally.move(life, RolloutStatus.QUEUED)
        else:
            self._tally.move(life, RolloutStatus.FAILED)

    def _take_back(self, life: Life, attempt: Attempt) -> None:
        """Undoes what an attempt's silence cost its rollout."""
        if attempt.outcome is not None:
            life.faults -= attempt.outcome.fault
            life.tries -= not attempt.outcome.fault

    def _revive(self, life: Life, attempt: Attempt) -> None:
        self._take_back(life, attempt)
        attempt.status, attempt.outcome, attempt.ended = AttemptStatus.RUNNING, None, None
        life.ticket = -1
        life.outcome = life.attempts[-2].outcome if len(life.attempts) > 1 else None
        self._tally.move(life, RolloutStatus.RUNNING)
        self._watch(life, attempt)

    def _cancel(self, life: Life, now: float) -> None:
        if life.attempts and self._capabilities.is_open(life.attempts[-1]):
            attempt = life.attempts[-1]
            attempt.status, attempt.ended = AttemptStatus.CANCELLED, now
            self._capabilities.close(attempt, now)
        life.ticket = -1
        self._tally.move(life, RolloutStatus.CANCELLED)

    def _retry(self, life: Life, now: float) -> None:
        life.tries = life.faults = 0
        life.retried = len(life.attempts)
        self._place(life)
        self._tally.move(life, RolloutStatus.QUEUED)

    def _forget(self, life: Life, now: float) -> None:
        del self._rollouts[life.spec.rollout_id]
        self._tally.drop(life)
        self.past.append(life)

    def _restore(self, life: Life) -> None:
        self._rollouts[life.spec.rollout_id] = life
        self._tally.add(life)
        if life.status is RolloutStatus.QUEUED:
            heappush(self._queue, Ready(-life.spec.priority, life.ticket, life.spec.rollout_id))
            self._tickets = max(self._tickets, life.ticket)
        if life.attempts and life.attempts[-1].live:
            self._admit(life, life.attempts[-1])

    def _place(self, life: Life) -> None:
        self._tickets += 1
        life.ticket = self._tickets
        heappush(self._queue, Ready(-life.spec.priority, life.ticket, life.spec.rollout_id))

    def _latest(self, attempt_id: str) -> tuple[Life, Attempt] | None:
        life = self._rollouts.get(attempt_id.rpartition("/")[0])
        if life is None or not life.attempts or life.attempts[-1].attempt_id != attempt_id:
            return None
        return life, life.attempts[-1]

    def _leased(self, request: str) -> Lease | None:
        attempt_id = self._capabilities.asked_with(request)
        found = None if attempt_id is None else self._latest(attempt_id)
        if found is None:
            return None
        return found[0].lease(self._run_id, capability_of(request, found[1].attempt_id))
