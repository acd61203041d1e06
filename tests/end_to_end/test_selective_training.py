"""Two roles, one trained: its score rises, and the other's weights stay bit for bit."""

import json
from pathlib import Path

import pytest

from lightning_ray.policies.registry import PolicyRegistry
from lightning_ray.spans import read_folder
from lightning_ray.tracking import read_summary
from lightning_ray.tracking.store import default_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HELDOUT = Path(__file__).parent.parent.parent / "examples/calculator/heldout.jsonl"


def train(cli, root: Path, experiment: str, *settings: str) -> Path:
    """A run of an experiment on 24 held-out tasks; its folder."""
    tasks = root / "heldout.jsonl"
    tasks.write_text("\n".join(HELDOUT.read_text().splitlines()[:24]) + "\n")
    done = cli.run(
        "train",
        f"experiment={experiment}",
        f"evaluation.tasks={tasks}",
        f"output_dir={root}",
        *settings,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = root.glob("*/summary.json")
    return folder.parent


def calls(folder: Path, policy: str) -> list[dict]:
    return [
        row
        for row in read_folder(folder / "spans").to_pylist()
        if row["kind"] == "model_call" and row["policy"] == policy
    ]


def test_the_planner_learns_and_the_solver_stays(cli, tmp_path):
    """Both ask for one model name here, and are told apart by their system prompts."""
    folder = train(
        cli,
        tmp_path,
        "planner_by_prompt",
        "training.steps=10",
        "learner.learning_rate=2e-5",
        "evaluation.samples_per_task=2",
    )
    summary = read_summary(folder / "summary.json")
    print(f"held-out {summary.heldout_before:.3f} before, {summary.heldout_after:.3f} after")
    assert summary.heldout_after > summary.heldout_before + 0.15
    assert summary.extra["frozen_before"] == summary.extra["frozen_after"]
    assert list(summary.extra["frozen_before"]) == ["solver"]
    solver, planner = calls(folder, "solver"), calls(folder, "planner")
    assert {row["version"] for row in solver} == {0}
    assert {row["version"] for row in planner} >= {0, 1, 5}
    assert {row["role"] for row in solver} == {"solver"}
    registry = PolicyRegistry(default_uri(tmp_path), "planner", summary.mlflow_run_id)
    assert registry.latest().number == summary.extra["version"]
    assert PolicyRegistry(default_uri(tmp_path), "solver", summary.mlflow_run_id).versions() == []


def test_the_solver_learns_and_the_planner_stays(cli, tmp_path):
    """The other way round, by model names; two steps show which weights move."""
    folder = train(cli, tmp_path, "solver", "training.steps=2", "training.tasks_per_step=4")
    summary = read_summary(folder / "summary.json")
    assert summary.extra["frozen_before"] == summary.extra["frozen_after"]
    assert list(summary.extra["frozen_before"]) == ["planner"]
    assert {row["version"] for row in calls(folder, "planner")} == {0}
    assert max(row["version"] for row in calls(folder, "solver")) == summary.extra["version"] > 0
    assert json.loads((folder / "run.json").read_text())["mlflow_run_id"]
