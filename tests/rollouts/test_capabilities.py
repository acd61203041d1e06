"""Capabilities of attempts: whom they stand for, and for how long."""

import pytest

from lightning_ray.rollouts import AttemptOutcome, AttemptStatus, RolloutSpec
from lightning_ray.rollouts.lifecycle import Lifecycle

GRACE_S = 5.0


def spec(rollout_id: str, max_attempts: int = 2) -> RolloutSpec:
    return RolloutSpec(rollout_id, "task", {}, 10.0, max_attempts)


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
        assert lives.finish(lease.attempt_id, AttemptOutcome(AttemptStatus.SUCCEEDED), now)
    elif end == "cancel":
        lives.cancel(["a"], now)
    else:
        now = 10.0 + GRACE_S + 1
        assert lives.expire(now).overdue == [lease.attempt_id]
    lives.forget(["a"], now)
    assert lives.resolve(lease.capability) is None
    for later in (now, now + 29, now + 30):
        lives.expire(later)
        assert lives.resolve(lease.capability, telling=True) == identity
    lives.expire(now + 31)
    assert lives.resolve(lease.capability, telling=True) is None
    assert lives._capabilities.lingering == 0
