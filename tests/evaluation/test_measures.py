import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.evaluation.measures import (
    completion_quality,
    paired_difference,
    ratio,
    share,
)

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=30)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_share_has_the_published_wilson_interval(
    successes: int, n: int, low: float, high: float
) -> None:
    found = completion_quality([1.0] * successes + [0.0] * (n - successes))
    assert found.mean == successes / n and found.n == n
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@given(st.integers(0, 50), st.integers(1, 50))
def test_a_share_lies_in_its_interval_and_the_interval_in_zero_to_one(k: int, n: int) -> None:
    found = completion_quality([1] * min(k, n) + [0] * (n - min(k, n)))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.low < found.high


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_rewards() -> None:
    rewards = np.random.default_rng(1).normal(0.4, 0.2, 2000)
    found = completion_quality(rewards)
    half = 1.959964 * rewards.std(ddof=1) / math.sqrt(rewards.size)
    assert found.mean == pytest.approx(rewards.mean())
    assert found.low == pytest.approx(rewards.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(rewards.mean() + half, abs=0.1 * half)


@settings(deadline=None, max_examples=25)
@given(REWARDS, st.integers(0, 5))
def test_an_unmeasured_attempt_changes_nothing_but_is_not_counted(
    rewards: list[float], faults: int
) -> None:
    assert completion_quality(rewards + [math.nan] * faults) == completion_quality(rewards)
    assert completion_quality(rewards).n == len(rewards)


def test_a_fault_is_not_a_zero() -> None:
    assert completion_quality([1.0, 1.0, math.nan]).mean == 1.0
    assert completion_quality([1.0, 1.0, 0.0]).mean == pytest.approx(2 / 3)


def test_nothing_measured_has_no_mean_and_one_reward_no_bound() -> None:
    nothing = completion_quality([math.nan])
    assert nothing.n == 0 and math.isnan(nothing.mean)
    one = completion_quality([0.1])
    assert (one.mean, one.low, one.high, one.n) == (0.1, -math.inf, math.inf, 1)


def test_pairs_cancel_the_difficulty_of_their_tasks() -> None:
    difficulty = np.random.default_rng(2).uniform(0, 10, 50)
    gain = np.where(np.arange(50) % 2 == 0, 0.4, 0.6)
    found = paired_difference(difficulty, difficulty + gain)
    assert found.mean == pytest.approx(0.5)
    assert 0.4 < found.low < 0.5 < found.high < 0.6


@settings(deadline=None, max_examples=25)
@given(REWARDS)
def test_a_difference_turned_round_is_its_negative(rewards: list[float]) -> None:
    other = rewards[::-1]
    found, turned = paired_difference(rewards, other), paired_difference(other, rewards)
    assert found.mean == pytest.approx(-turned.mean, abs=1e-9)
    assert found.low <= found.mean <= found.high


def test_a_pair_with_a_fault_is_left_out() -> None:
    found = paired_difference([0.0, math.nan, 0.0, 1.0], [1.0, 1.0, math.nan, 1.0])
    assert (found.mean, found.n) == (0.5, 2)


def test_rewards_that_are_not_of_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="not of pairs"):
        paired_difference([0.0], [0.0, 1.0])


def test_a_ratio_has_an_interval_over_its_pairs() -> None:
    generator = np.random.default_rng(4)
    resolved = generator.integers(0, 2, 400)
    costs = generator.uniform(1, 3, 400)
    found = ratio(costs, resolved)
    assert found.mean == pytest.approx(costs.sum() / resolved.sum()) and found.n == 400
    # The delta method: the spread of (cost - ratio x resolved) over the mean of resolved.
    spread = (costs - found.mean * resolved).std() / resolved.mean() / math.sqrt(400)
    assert found.low == pytest.approx(found.mean - 1.96 * spread, rel=0.03)
    assert found.high == pytest.approx(found.mean + 1.96 * spread, rel=0.03)


def test_a_ratio_that_may_have_no_denominator_is_unbounded() -> None:
    found = ratio([1.0, 1.0, 1.0], [1, 0, 0])
    assert (found.mean, found.high) == (3.0, math.inf) and found.low <= 3.0
    assert ratio([2.0], [1]).high == math.inf
    with pytest.raises(ValueError, match="no ratio"):
        ratio([1.0], [0])


def test_a_share_of_nothing_is_no_share() -> None:
    assert share(0, 0).n == 0 and math.isnan(share(0, 0).mean)
    assert share(15, 148) == completion_quality([1.0] * 15 + [0.0] * 133)
