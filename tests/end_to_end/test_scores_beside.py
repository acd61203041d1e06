"""Held-out scores beside training: of a pinned version, while later ones are sampled and learnt."""

from pathlib import Path

import pyarrow.compute as pc
import pytest
from mlflow import MlflowClient

from lightning_ray.spans import read_folder
from lightning_ray.tracking import read_summary
from lightning_ray.tracking.store import default_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HELDOUT = Path(__file__).parents[2] / "examples/calculator/heldout.jsonl"
STEPS, EVERY, TASKS = 5, 2, 6


def test_steps_are_scored_on_their_own_version_while_training_goes_on(cli, tmp_path):
    tasks = tmp_path / "few.jsonl"
    tasks.write_text("\n".join(HELDOUT.read_text().splitlines()[:TASKS]) + "\n")
    done = cli.run(
        "train",
        "experiment=calculator",
        f"output_dir={tmp_path}",
        f"evaluation.tasks={tasks}",
        f"evaluation.every={EVERY}",
        f"training.steps={STEPS}",
        "training.tasks_per_step=4",
        "algorithm.group_size=4",
        "training.staleness=1",
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    (path,) = tmp_path.glob("*/summary.json")
    summary = read_summary(path)
    rows = {int(row["step"]): row for row in summary.extra["history"]}
    scored = [step for step, row in rows.items() if "heldout" in row]
    # One may still have been under way when the other was due.
    assert scored and set(scored) <= {2, 4} and 2 in scored
    client = MlflowClient(default_uri(tmp_path))
    logged = client.get_metric_history(summary.mlflow_run_id, "heldout_reward")
    assert {metric.step for metric in logged} == {0, *scored, STEPS}
    calls = read_folder(path.parent / "spans").filter(pc.field("kind") == "model_call")
    for step in scored:
        assert f"at step {step} (version " in done.stdout
        mine = calls.filter(pc.starts_with(calls["rollout_id"], f"heldout-b{step:05d}-"))
        assert len(set(mine["rollout_id"].to_pylist())) == TASKS
        # A step that taught nothing made no version.
        assert set(mine["version"].to_pylist()) == {int(rows[step]["version"])}
    # Nothing of a score was learnt from.
    assert sum(row["tasks"] for row in rows.values()) == STEPS * 4
