import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import UserError
from lightning_ray.training import RunFolder, RunState
from lightning_ray.training.state import PolicyState

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def test_a_run_is_found_again_by_its_id_or_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RunFolder.create(tmp_path, "calculator", ["experiment=calculator", "training.steps=3"])
    made.write_facts({"mlflow_run_id": "abc"})
    assert made.run_id.startswith("calculator-") and made.path.parent == tmp_path
    monkeypatch.chdir(tmp_path)
    for output_dir, run in [
        (tmp_path, made.run_id),
        (Path("."), made.run_id),
        (Path("elsewhere"), str(made.path)),
        (Path("elsewhere"), made.run_id),
    ]:
        found = RunFolder.find(output_dir, run)
        assert found.path == made.path and found.run_id == made.run_id
        assert found.overrides() == ["experiment=calculator", "training.steps=3"]
        assert found.facts() == {"mlflow_run_id": "abc"}


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    made = {RunFolder.create(tmp_path, "run", []).path for _ in range(20)}
    assert len(made) == 20


def test_a_run_that_is_not_there_is_one_line_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume=x: no such run in .*; there are none there"):
        RunFolder.find(tmp_path, "x")
    made = RunFolder.create(tmp_path, "run", [])
    for run in ("x", "", made.run_id + "/versions"):
        with pytest.raises(UserError, match=f"resume={run}: no such run .*{made.run_id}$"):
            RunFolder.find(tmp_path, run)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir=.*/file: cannot make .* \(Not a directory\)"):
        RunFolder.create(tmp_path / "file", "run", [])


def checkpoint(folder: RunFolder, step: int) -> Path:
    path = folder.checkpoint(step)
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"step": step}))
    return path


def test_the_newest_whole_checkpoint_is_the_one_to_go_on_from(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", [])
    assert folder.last_checkpoint() is None
    for step in (9, 10, 8):
        last = checkpoint(folder, step)
    # What a run left that was killed while it saved, and while it removed.
    (folder.checkpoints / ".step-000011.partial").mkdir()
    os.rename(checkpoint(folder, 12), folder.checkpoints / ".removing-step-000012")
    assert folder.last_checkpoint() == folder.checkpoint(10)
    assert folder.whole_checkpoints() == [folder.checkpoint(step) for step in (8, 9, 10)]
    assert last == folder.checkpoint(8)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_are_kept_and_the_rest_is_gone(tmp_path: Path, keep: int) -> None:
    folder = RunFolder.create(tmp_path, "run", [])
    steps = [1, 2, 10, 999_999, 1_000_000]
    for step in steps:
        checkpoint(folder, step)
    os.rename(checkpoint(folder, 3), folder.checkpoints / ".removing-step-000003")
    folder.prune_checkpoints(keep)
    assert folder.whole_checkpoints() == [folder.checkpoint(step) for step in steps[-keep:]]
    assert sorted(folder.checkpoints.iterdir()) == sorted(folder.whole_checkpoints())


def test_versions_are_counted_from_what_is_on_disk(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", [])
    assert folder.last_version("planner") == 0
    for number in (2, 10, 9):
        folder.version("planner", number).mkdir(parents=True)
    for name in ("11.partial", "best"):
        (folder.versions_of("planner") / name).mkdir()
    assert folder.last_version("planner") == 10
    # The number of one that was never written whole is taken, and what it took is freed.
    partial = folder.versions_of("planner") / ".12.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("half")
    folder.empty_partial_versions("planner")
    assert list(partial.iterdir()) == [] and folder.last_version("planner") == 12
    folder.versions.rename(tmp_path / "gone")
    assert folder.last_version("planner") == 0


@given(
    st.builds(
        RunState,
        step=st.integers(0),
        policies=st.dictionaries(
            st.text(), st.builds(PolicyState, st.integers(0), st.lists(st.integers(0)))
        ),
        position=st.integers(0),
        train_seconds=FINITE,
        tokens_generated=st.integers(0),
        heldout_before=st.none() | st.dictionaries(st.text(), FINITE | st.text()),
        history=st.lists(st.dictionaries(st.text(), FINITE)),
        left_out=st.integers(0),
    )
)
def test_a_runs_state_is_the_same_after_it_was_written_as_json(state: RunState) -> None:
    written = json.loads(json.dumps(state.to_json()))
    assert RunState.from_json(written) == state
    assert set(written) == set(asdict(RunState()))


def test_a_state_with_what_nobody_knows_is_refused() -> None:
    with pytest.raises(TypeError, match="momentum"):
        RunState.from_json({"step": 1, "policies": {}, "momentum": 0.9})
