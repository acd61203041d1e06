"""A fault of the infrastructure is no outcome of the agent, in what the queue counts."""

from collections.abc import Iterator

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    QueueClient,
    RolloutsConfig,
    RolloutSpec,
    RolloutStatus,
    start_queue,
)
from lightning_ray.rollouts.blame import Blame

ENDS = [
    AttemptStatus.SUCCEEDED,
    AttemptStatus.FAILED,
    AttemptStatus.TIMED_OUT,
    AttemptStatus.CANCELLED,
]


@given(st.lists(st.booleans(), max_size=4), st.sampled_from(ENDS), st.booleans())
def test_what_was_lost_excuses_any_end_and_what_was_refused_a_failure(
    faults: list[bool], status: AttemptStatus, ours_already: bool
) -> None:
    blame = Blame()
    for lost in faults:
        blame.note("a/1", "an engine died", lost)
    rewards = {"reward": 1.0} if status is AttemptStatus.SUCCEEDED else {}
    outcome = AttemptOutcome(status, rewards, error="exit code 1", fault=ours_already)
    found = blame.excuse("a/1", outcome)
    failed = status in (AttemptStatus.FAILED, AttemptStatus.TIMED_OUT)
    succeeded = status is AttemptStatus.SUCCEEDED
    if not ours_already and ((faults and failed) or (any(faults) and succeeded)):
        assert (found.fault, found.status, found.rewards) == (True, AttemptStatus.FAILED, {})
        assert found.error == "an engine died\nexit code 1"
    else:
        assert found == outcome
    assert blame.excuse("another/1", outcome) == outcome
    blame.forget(["a/1"])
    assert blame.excuse("a/1", outcome) == outcome


@pytest.fixture
def queue(ray_cluster: None) -> Iterator[QueueClient]:
    queue = start_queue("run", RolloutsConfig())
    yield queue
    ray.kill(queue.actor)


def test_a_blamed_attempt_is_tried_again_and_costs_the_agent_nothing(queue: QueueClient) -> None:
    queue.enqueue([RolloutSpec("r", "task", {}, 60.0, max_attempts=1, max_faults=1)])

    def attempt(*, lost: bool | None, status: AttemptStatus) -> bool:
        lease = ray.get(queue.actor.dequeue.remote(5), timeout=10)
        if lost is not None:
            ray.get(queue.actor.blame.remote(lease.attempt_id, "cut off", lost), timeout=10)
        outcome = AttemptOutcome(status, {"reward": 0.0} if not lost else {})
        return bool(ray.get(queue.actor.finish.remote(lease.attempt_id, outcome), timeout=10))

    assert attempt(lost=True, status=AttemptStatus.SUCCEEDED)
    assert queue.wait(["r"], 0.1) == [], "it is queued again"
    # The same for who was refused, and came through all the same: that counts.
    assert attempt(lost=False, status=AttemptStatus.SUCCEEDED)
    (record,) = queue.wait(["r"], 5)
    assert record.status is RolloutStatus.SUCCEEDED and record.outcome is not None
    assert record.outcome.rewards == {"reward": 0.0}
    assert [status for _, status in record.attempts] == [
        AttemptStatus.FAILED,
        AttemptStatus.SUCCEEDED,
    ]


def test_an_attempt_that_is_over_cannot_be_blamed(queue: QueueClient) -> None:
    queue.enqueue([RolloutSpec("r", "task", {}, 60.0, max_attempts=1)])
    lease = ray.get(queue.actor.dequeue.remote(5), timeout=10)
    failed = AttemptOutcome(AttemptStatus.FAILED, error="exit code 1")
    assert ray.get(queue.actor.finish.remote(lease.attempt_id, failed), timeout=10)
    ray.get(queue.actor.blame.remote(lease.attempt_id, "cut off", True), timeout=10)
    (record,) = queue.wait(["r"], 5)
    assert record.status is RolloutStatus.FAILED
    assert record.outcome is not None and not record.outcome.fault
