"""Choosing an algorithm: what is refused, what it costs to import, how tokens are weighted."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_ray.algorithms import (
    AlgorithmConfig,
    LossConfig,
    check_algorithm,
    make_algorithm,
    token_weights,
)
from lightning_ray.algorithms.config import AGGREGATIONS
from lightning_ray.errors import UserError


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'gpro'; use cispo, dapo, dr_grpo, grpo"):
        make_algorithm(AlgorithmConfig(name="gpro"))


@pytest.mark.parametrize(
    "config",
    [
        AlgorithmConfig(group_size=1),
        AlgorithmConfig(group_size=1, min_group=1),
        AlgorithmConfig(group_size=0),
        AlgorithmConfig(std_epsilon=0.0),
        AlgorithmConfig(loss=LossConfig(epsilon_low=0.0)),
        AlgorithmConfig(loss=LossConfig(epsilon_low=1.5)),
        AlgorithmConfig(loss=LossConfig(epsilon_high=float("inf"))),
        AlgorithmConfig(loss=LossConfig(aggregation="mean")),
    ],
)
def test_numbers_that_cannot_work_are_refused(config):
    with pytest.raises(UserError, match=r"^algorithm\."):
        check_algorithm(config)


def test_the_configuration_is_a_hydra_schema_that_can_be_overridden():
    config = OmegaConf.structured(AlgorithmConfig)
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(["loss.epsilon_high=0.28"]))
    assert OmegaConf.to_object(config).loss == LossConfig(epsilon_high=0.28)


def test_choosing_an_algorithm_imports_no_torch():
    program = (
        "import sys, lightning_ray.algorithms as a; a.make_algorithm(a.AlgorithmConfig()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


ATTEMPTS = st.lists(st.integers(0, 4), min_size=1, max_size=30).map(
    lambda values: np.array(values, np.int64)
)


@given(ATTEMPTS, st.integers(1, 50))
def test_weights_share_out_what_they_say(attempts, fixed_length):
    np.testing.assert_allclose(token_weights(attempts, "token_mean"), 1 / len(attempts))
    groups = attempts // 2
    for weights, members in (
        (token_weights(attempts, "sequence_mean"), attempts),
        (token_weights(attempts, "group_mean", groups), groups),
    ):
        present = np.unique(members)
        for one in present:
            mine = weights[members == one]
            np.testing.assert_allclose(mine.sum(), 1 / len(present))
            np.testing.assert_allclose(mine, mine[0])
    constant = token_weights(attempts, "fixed_length", fixed_length=fixed_length)
    np.testing.assert_allclose(constant, 1 / (len(np.unique(attempts)) * fixed_length))


def test_weights_that_miss_what_they_need_are_refused():
    one = np.zeros(1, np.int64)
    for aggregation in ("group_mean", "fixed_length", "mean"):
        with pytest.raises(ValueError, match=r"needs|unknown"):
            token_weights(one, aggregation)


def test_no_tokens_have_no_weights():
    for aggregation in AGGREGATIONS:
        assert token_weights(np.empty(0, np.int64), aggregation).shape == (0,)
