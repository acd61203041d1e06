"""A run's checkpoint holds all policies that learn, of one moment, or is not there."""

from pathlib import Path
from typing import Any

import pytest

from lightning_ray.errors import PartLostError, UserError
from lightning_ray.training import RunFolder, RunState
from lightning_ray.training.checkpoints import Checkpoints
from lightning_ray.training.state import PolicyState


class Learner:
    """Keeps a number in place of weights; dies where it is told to."""

    def __init__(self, weights: int, dies: bool = False):
        self.weights = weights
        self.dies = dies

    def save_checkpoint(self, path: Path, state: dict[str, Any], timeout_s: float) -> Path:
        if self.dies:
            raise PartLostError("a learner actor was lost during save_checkpoint")
        path.mkdir()
        (path / "weights").write_text(str(self.weights))
        return path

    def load_checkpoint(self, path: Path, timeout_s: float) -> dict[str, Any]:
        self.weights = int((path / "weights").read_text())
        return {}


def state_of(step: int) -> RunState:
    policies = {"planner": PolicyState(step, [step]), "solver": PolicyState(step - 1)}
    return RunState(step=step, policies=policies)


def test_each_policy_goes_on_from_its_own_weights(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", [])
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        learners = {"planner": Learner(10 + step), "solver": Learner(20 + step)}
        checkpoints.save(learners, state_of(step))
    assert [path.name for path in folder.whole_checkpoints()] == ["step-000002", "step-000003"]
    assert checkpoints.needed("planner") == {2, 3} and checkpoints.needed("solver") == {1, 2}
    again = {"planner": Learner(0), "solver": Learner(0)}
    newest = folder.last_checkpoint()
    assert newest is not None
    assert checkpoints.load(newest, again) == state_of(3)
    assert [learner.weights for learner in again.values()] == [13, 23]


def test_a_learner_that_dies_while_another_has_saved_leaves_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    folder = RunFolder.create(tmp_path, "run", [])
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save({"planner": Learner(1), "solver": Learner(2)}, state_of(1))
    with pytest.raises(PartLostError):
        checkpoints.save({"planner": Learner(3), "solver": Learner(4, dies=True)}, state_of(2))
    assert [path.name for path in folder.whole_checkpoints()] == ["step-000001"]
    # What the dead one left is no hindrance.
    checkpoints.save({"planner": Learner(5), "solver": Learner(6)}, state_of(2))
    newest = folder.last_checkpoint()
    assert newest is not None and newest.name == "step-000002"
    again = {"planner": Learner(0), "solver": Learner(0)}
    assert checkpoints.load(newest, again).step == 2
    assert [learner.weights for learner in again.values()] == [5, 6]


def test_a_policy_that_was_frozen_before_cannot_go_on(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", [])
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save({"planner": Learner(1)}, state_of(1))
    newest = folder.last_checkpoint()
    assert newest is not None
    with pytest.raises(UserError, match="nothing of the policy solver, which is to be trained"):
        checkpoints.load(newest, {"planner": Learner(0), "solver": Learner(0)})


@pytest.mark.parametrize("state", ["", "{", "[]", '{"learner": {}, "state": {"step": 8}}'])
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path, state: str) -> None:
    """The last one is what an earlier release wrote."""
    folder = tmp_path / "step-000008"
    folder.mkdir()
    if state:
        (folder / "state.json").write_text(state)
    with pytest.raises(UserError, match="start anew") as raised:
        Checkpoints.peek(folder)
    assert len(str(raised.value).splitlines()) == 1
