"""Two sets on the same tasks: pairing, and the sign-flip test against enumerating every pattern."""

import itertools

import numpy as np
import pytest
from evaluation_support import attempt, table
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.evaluation.comparison import compare, sign_flip_test
from lightning_ray.evaluation.outcomes import Outcome, read_outcomes


def outcomes(*rewards: tuple[str, float | None]) -> list[Outcome]:
    rows = []
    for number, (task, value) in enumerate(rewards):
        given_ = {} if value is None else {"reward": value}
        rows += attempt(f"r{number}/1", task, given_)
    return read_outcomes(table(rows))


@settings(max_examples=40)
@given(st.lists(st.integers(-3, 3).map(float), max_size=9))
def test_the_p_value_is_the_share_of_sign_patterns_as_far_from_zero(values: list[float]) -> None:
    observed = abs(sum(values))
    patterns = list(itertools.product((1, -1), repeat=len(values)))
    far = [abs(sum(s * v for s, v in zip(p, values, strict=True))) >= observed for p in patterns]
    assert sign_flip_test(values) == pytest.approx(sum(far) / len(patterns))


def test_five_wins_of_five_have_the_p_value_of_the_sign_test() -> None:
    assert sign_flip_test([0.3] * 5) == 2 / 2**5
    assert sign_flip_test([0.0] * 5) == 1.0
    assert sign_flip_test([]) == 1.0


def test_many_differences_are_sampled_and_agree_with_the_normal_test() -> None:
    differences = np.random.default_rng(3).normal(0.1, 1.0, 400)
    z = abs(differences.mean()) / (np.sqrt((differences**2).mean()) / 20)
    two_sided = 2 * (1 - 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))))
    assert sign_flip_test(differences) == pytest.approx(two_sided, abs=0.02)
    assert sign_flip_test(np.ones(50)) <= 1 / 20_000


def test_tasks_are_paired_by_the_mean_of_their_samples() -> None:
    ours = outcomes(("a", 1.0), ("a", 0.0), ("b", 1.0), ("c", 0.2), ("only", 1.0))
    theirs = outcomes(("c", 0.2), ("b", 0.0), ("b", None), ("a", 1.0))
    found = compare(ours, theirs, "reward")
    assert found is not None
    pairs = {pair.task_id: (pair.reward, pair.against) for pair in found.pairs}
    assert pairs == {"a": (0.5, 1.0), "b": (1.0, 0.0), "c": (0.2, 0.2)}
    assert (found.wins, found.ties, found.losses, found.unpaired) == (1, 1, 1, 1)
    assert found.difference.mean == pytest.approx(0.5 / 3)
    turned = compare(theirs, ours, "reward")
    assert turned is not None and turned.p_value == found.p_value
    assert turned.difference.mean == pytest.approx(-found.difference.mean)


def test_another_task_under_the_same_id_is_no_pair() -> None:
    ours = read_outcomes(table(attempt("r/1", "t", {"reward": 1.0}, task={"q": "1 + 1"})))
    theirs = read_outcomes(table(attempt("r/1", "t", {"reward": 0.0}, task={"q": "2 + 2"})))
    assert compare(ours, theirs, "reward") is None
    assert compare(ours, outcomes(("t", None)), "reward") is None
