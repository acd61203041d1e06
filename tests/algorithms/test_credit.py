"""Credit of every algorithm that comes with the package, against its formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.algorithms import (
    ALGORITHMS,
    AlgorithmConfig,
    Group,
    finish,
    make_algorithm,
    overlong,
    score,
)
from lightning_ray.algorithms.config import OverlongConfig
from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.training import TrainConfig

REWARDS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9)
BATCH = st.lists(REWARDS, min_size=1, max_size=4)


def settings_of(name: str, *more: str) -> AlgorithmConfig:
    """What `algorithm=NAME` is on the command line."""
    overrides = ["experiment=calculator", f"algorithm={name}", *more]
    config: TrainConfig = compose_config("train", TrainConfig, overrides)
    return config.algorithm


SETTINGS = {name: settings_of(name) for name in ALGORITHMS}


def credit_of(name: str, batch: list[list[float]]) -> list[np.ndarray]:
    algorithm = make_algorithm(SETTINGS[name])
    groups = groups_of(batch)
    return finish(algorithm, name, groups, [score(algorithm, name, one) for one in groups])


def groups_of(batch: list[list[float]]) -> list[Group]:
    return [
        Group(f"g{n}", np.array(rewards, np.float64), np.arange(1, len(rewards) + 1))
        for n, rewards in enumerate(batch)
    ]


def slow_credit(name: str, batch: list[list[float]]) -> list[list[float]]:
    """The formulas of the papers, one number at a time."""
    epsilon = SETTINGS[name].std_epsilon
    credits = []
    for rewards in batch:
        mean = sum(rewards) / len(rewards)
        std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
        if name in ("grpo", "dapo", "gspo", "cispo"):
            credits.append([(r - mean) / (std + epsilon) for r in rewards])
        elif name in ("dr_grpo", "reinforce_pp_baseline"):
            credits.append([r - mean for r in rewards])
        elif name == "rloo":
            others = [(sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
            credits.append([r - other for r, other in zip(rewards, others, strict=True)])
        else:
            credits.append(list(rewards))
    if name.startswith("reinforce_pp"):
        tokens = [c for credit in credits for n, c in enumerate(credit) for _ in range(n + 1)]
        mean = sum(tokens) / len(tokens)
        std = (sum((c - mean) ** 2 for c in tokens) / len(tokens)) ** 0.5
        credits = [[(c - mean) / (std + epsilon) for c in credit] for credit in credits]
    return credits


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@given(BATCH)
def test_credit_is_that_of_the_formula(name: str, batch: list[list[float]]) -> None:
    for mine, wanted, rewards in zip(
        credit_of(name, batch), slow_credit(name, batch), batch, strict=True
    ):
        assert len(mine) == len(rewards)
        # A deviation of nearly zero is all rounding.
        if name not in ("dr_grpo", "rloo") and np.ptp(rewards) < 1e-3:
            continue
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"ppo"}))
def test_what_is_equal_throughout_teaches_nothing(name: str) -> None:
    for credit in credit_of(name, [[0.3, 0.3, 0.3], [0.3, 0.3]]):
        assert not credit.any()


def test_a_group_without_contrast_teaches_beside_others_where_the_batch_is_the_baseline() -> None:
    algorithm = make_algorithm(SETTINGS["reinforce_pp"])
    assert algorithm.needs_contrast is False  # type: ignore[attr-defined]
    good, bad = credit_of("reinforce_pp", [[1.0, 1.0], [0.0, 0.0]])
    assert (good > 0).all() and (bad < 0).all()
    assert make_algorithm(settings_of("reinforce_pp", "algorithm.group_size=1"))
    # With a KL term in the reward the learner normalises, once that was taken away.
    settings = settings_of("reinforce_pp", "algorithm.loss.kl.coefficient=0.1")
    algorithm = make_algorithm(settings)
    groups = groups_of([[1.0, 0.0], [0.0, 0.0]])
    credits = [score(algorithm, "reinforce_pp", one) for one in groups]
    assert [one.tolist() for one in finish(algorithm, "reinforce_pp", groups, credits)] == [
        [1.0, 0.0],
        [0.0, 0.0],
    ]
    assert algorithm.zero_teaches  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("lengths", "penalties"),
    [([100, 60, 50], [1.0, 0.0, 0.0]), ([1, 99, 101], [0.0, 0.975, 1.0])],
)
def test_answers_near_the_longest_that_is_wanted_lose_reward(
    lengths: list[int], penalties: list[float]
) -> None:
    # Worked by hand: from 60 tokens on the penalty grows, at 100 it is full.
    config = OverlongConfig(max_tokens=100, buffer=40)
    np.testing.assert_allclose(overlong(np.array(lengths), config), penalties)
    assert not overlong(np.array(lengths), OverlongConfig()).any()
    # Without a buffer it is a cliff, which an answer cut at the limit falls from.
    cliff = overlong(np.array(lengths), OverlongConfig(max_tokens=99, penalty=0.5))
    np.testing.assert_allclose(cliff, [0.5 if n >= 99 else 0.0 for n in lengths])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("grpo", ["algorithm.loss.kind=cross_entropy"], "algorithm=grpo sets it"),
        (
            "grpo",
            ["algorithm.loss.kind=policy_gradient"],
            "policy_gradient with reinforce_pp or reinforce_pp_baseline or rloo",
        ),
        ("grpo", ["algorithm.group_size=1", "algorithm.min_group=1"], "use 2 or more"),
        ("grpo", ["algorithm.min_group=9"], "at most algorithm.group_size, 8"),
        ("grpo", ["algorithm.normalize=std"], "use none or group or batch"),
        ("grpo", ["algorithm.extra_rounds=-1"], "must be 0 or more"),
        ("grpo", ["algorithm.overlong.buffer=5"], "must lie between 0 and max_tokens=0"),
        ("grpo", ["algorithm.loss.fixed_length=5"], "the others have none"),
        ("grpo", ["algorithm.loss.kl.coefficient=-1"], "must be 0 or more"),
        ("grpo", ["algorithm.loss.kl.estimator=k4"], "use k1 or k2 or k3"),
        ("grpo", ["algorithm.loss.old=newest"], "use recorded or current"),
        ("grpo", ["algorithm.loss.correction.low=3"], "less than high=2"),
        ("dapo", ["algorithm.loss.epsilon_high=0.2"], "dapo needs more than epsilon_low=0.2"),
        ("gspo", ["algorithm.loss.kind=clipped"], "algorithm=gspo sets it"),
        ("dr_grpo", ["algorithm.normalize=group"], "dr_grpo needs none"),
        ("rloo", ["algorithm.normalize=group"], "rloo needs none"),
        ("reinforce_pp", ["algorithm.loss.kl.place=loss"], "reinforce_pp needs reward"),
        ("reinforce_pp", ["algorithm.normalize=none"], "reinforce_pp needs batch"),
        ("ppo", ["algorithm.loss.critic.coefficient=0"], "ppo needs a critic"),
        ("ppo", ["algorithm.loss.critic.trace=2"], "must lie between 0 and 1"),
        ("ppo", ["algorithm.loss.critic.rate=0"], "greater than 0"),
    ],
)
def test_settings_that_make_another_algorithm_of_it_are_refused(
    name: str, settings: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=r"^algorithm\.") as refused:
        make_algorithm(settings_of(name, *settings))
    assert said in str(refused.value) and "\n" not in str(refused.value)
