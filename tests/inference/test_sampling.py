"""What a run sets of sampling, over what agents ask for."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import UserError
from lightning_ray.inference import SamplingConfig, check_sampling, settled, what_is_set
from lightning_ray.inference.sampling import seed_of

WANTED = st.builds(
    SamplingConfig,
    temperature=st.none() | st.floats(0, 2),
    top_p=st.none() | st.floats(0.01, 1),
    top_k=st.none() | st.integers(0, 50),
    max_tokens=st.none() | st.integers(1, 100),
    seed=st.none() | st.integers(0, 2**40),
)


@given(WANTED, st.none() | st.integers(1, 100), st.floats(0, 2))
def test_what_is_set_holds_and_the_rest_is_the_agents(
    config: SamplingConfig, asked_tokens: int | None, asked_temperature: float
) -> None:
    check_sampling(config, "x")
    asked: dict[str, Any] = {"temperature": asked_temperature, "top_p": 1.0, "top_k": 0}
    asked["max_tokens"] = asked_tokens
    drawn = asked | settled(asked, what_is_set(config), "r/1", 0)
    for name in ("temperature", "top_p", "top_k"):
        wanted = getattr(config, name)
        assert drawn[name] == (asked[name] if wanted is None else wanted)
    limits = [n for n in (asked_tokens, config.max_tokens) if n is not None]
    assert drawn["max_tokens"] == min(limits, default=None)
    assert ("seed" in drawn) == (config.seed is not None)


def test_no_two_calls_share_a_seed_and_a_repetition_has_the_same() -> None:
    attempts = ["r1/1", "r1/2", "r11/1", "r11/2"]
    names = [(seed, one, number) for seed in (0, 1) for one in attempts for number in range(40)]
    seeds = [seed_of(*name) for name in names]
    assert len(set(seeds)) == len(names) and all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [seed_of(*name) for name in names]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, r"x\.temperature=-0\.1: must be 0 or more"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "above 0, at most 1"),
        ({"top_p": 1.1}, "above 0, at most 1"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "at least 1"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_nobody_can_sample_with_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sampling(SamplingConfig(**changes), "x")
