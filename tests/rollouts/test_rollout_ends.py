"""What becomes of a rollout after its end, and of reports that come late."""

import pytest
from test_rollout_lifecycle import GRACE_S, spec

from lightning_ray.rollouts.lifecycle import Lifecycle
from lightning_ray.rollouts.types import AttemptOutcome, AttemptStatus, RolloutStatus


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
    assert first is not None and lives.expire(15.1).overdue == [first.attempt_id]
    second = lives.dequeue(16.0)
    assert second is not None
    assert not lives.finish(
        first.attempt_id, AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})
    )
    assert lives.finish(second.attempt_id, AttemptOutcome(AttemptStatus.FAILED))
    record = lives.record("a")
    assert record.status is RolloutStatus.FAILED and record.attempt_id == second.attempt_id
    assert record.outcome is not None and record.outcome.rewards == {}
