"""The numbers of a step in which several policies learn."""

from typing import Any

import pytest
from test_step_batches import batch_of, one_of_each

from lightning_ray.training.state import RunState
from lightning_ray.training.step_metrics import step_metrics
from lightning_ray.training.trainee import Lesson


def lesson(behind: int) -> Lesson:
    _, batch = batch_of(*one_of_each())
    unused: Any = None
    return Lesson(unused, batch, None, behind)


def test_of_one_policy_they_have_their_plain_names() -> None:
    found = step_metrics({"policy": lesson(1)}, {"policy": 4})
    assert (found["version"], found["staleness"]) == (4.0, 1.0)
    assert not any("/" in name for name in found)


def test_of_several_each_has_its_own_and_what_can_be_counted_together_is() -> None:
    alone = step_metrics({"planner": lesson(0)}, {"planner": 1})
    both = step_metrics({"planner": lesson(0), "solver": lesson(2)}, {"planner": 3, "solver": 1})
    assert (both["planner/version"], both["solver/version"]) == (3.0, 1.0)
    assert "version" not in both and "groups_used" not in both
    assert both["staleness"] == 2.0
    for name in ("sampled_tokens", "left_out", "hygiene_infrastructure_faults"):
        assert both[name] == 2 * alone[name] > 0
        assert both[f"solver/{name}"] == alone[name]


@pytest.mark.parametrize("published", [[], [1, 2, 5]])
def test_a_policy_counts_its_own_updates(published: list[int]) -> None:
    state = RunState()
    state.of("planner").published = published
    assert state.of("planner").behind(1) == len([n for n in published if n > 1])
    assert state.of("solver").behind(0) == 0 and set(state.policies) == {"planner", "solver"}
