"""GRPO's advantages against the formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.algorithms import AlgorithmConfig, Group, has_contrast, make_algorithm

REWARDS = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=16)


def group(rewards: list[float]) -> Group:
    return Group("g", np.array(rewards, np.float64), np.ones(len(rewards), np.int64))


def test_the_formula_on_numbers_worked_by_hand():
    advantages = make_algorithm(AlgorithmConfig(std_epsilon=1e-9)).score_group(
        group([1.0, 0.0, 0.0, 1.0])
    )
    np.testing.assert_allclose(advantages, [1, -1, -1, 1], rtol=1e-6)
    plain = make_algorithm(AlgorithmConfig(normalize="none"))
    np.testing.assert_allclose(plain.score_group(group([3.0, 0.0, 0.0])), [2, -1, -1])


@given(REWARDS)
def test_advantages_sum_to_zero_and_keep_the_order_of_the_rewards(rewards):
    one = group(rewards)
    advantages = make_algorithm(AlgorithmConfig()).score_group(one)
    assert advantages.shape == (len(rewards),)
    assert abs(advantages.sum()) <= 1e-6 * max(1.0, np.abs(advantages).max()) * len(rewards)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(advantages[order]) >= 0).all()
    assert has_contrast(one) == (len(set(rewards)) > 1)


@given(st.floats(-100, 100), st.integers(1, 16))
def test_a_group_without_contrast_teaches_nothing(reward, size):
    one = group([reward] * size)
    assert not has_contrast(one)
    assert not make_algorithm(AlgorithmConfig()).score_group(one).any()


def test_a_group_that_is_not_one_is_refused():
    with pytest.raises(ValueError, match="not a finite number"):
        group([1.0, float("nan")])
    with pytest.raises(ValueError, match="one length"):
        Group("g", np.zeros(2), np.zeros(3, np.int64))
