"""The main job on the real stack: trained a few steps, stopped by Ctrl-C, and resumed.

One run serves all tests of this file: Ray, Ray Serve, vLLM, DeepSpeed, MLflow and the real model.
"""

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import psutil
import pyarrow as pa
import pytest
from mlflow import MlflowClient

from lightning_ray.agents import load_tasks
from lightning_ray.evaluation import heldout_scores
from lightning_ray.policies import PolicyRegistry
from lightning_ray.spans.segment import read_segment
from lightning_ray.tracking import read_summary
from lightning_ray.training.order import TaskOrder

# Two starts of the whole stack, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1500)

# With 8 samples of a task it is all but certain that every step has something to learn.
STEPS, TASKS, GROUP = 4, 4, 8
TRAIN_FILE = "examples/calculator/train.jsonl"


@dataclass
class Story:
    """What was seen of the run."""

    folder: Path
    stopped_within: float
    left_behind: list[str]
    first_output: str
    second_output: str


@pytest.fixture(scope="module")
def story(cli, few_heldout, tmp_path_factory) -> Iterator[Story]:
    """Trains until three of four steps are done, presses Ctrl-C, and resumes."""
    output = tmp_path_factory.mktemp("outputs")
    process = cli.start(
        "train",
        "experiment=calculator",
        f"output_dir={output}",
        f"training.steps={STEPS}",
        f"training.tasks_per_step={TASKS}",
        f"algorithm.group_size={GROUP}",
        "training.checkpoint_every=2",
        f"evaluation.tasks={few_heldout}",
    )
    lines = []
    assert process.stdout is not None
    family: list[psutil.Process] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            family = psutil.Process(process.pid).children(recursive=True)
            pressed = time.monotonic()
            process.send_signal(signal.SIGINT)
    assert family, "".join(lines)
    status = process.wait(timeout=60)
    stopped_within = time.monotonic() - pressed
    assert status == 130, "".join(lines)
    left = [p.name() for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    (folder,) = [path for path in output.iterdir() if (path / "overrides.json").is_file()]
    resumed = cli.run("train", f"resume={folder}", timeout=900)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    yield Story(folder, stopped_within, left, "".join(lines), resumed.stdout)


def test_ctrl_c_stops_the_job_within_15_seconds_and_leaves_no_process(story):
    assert story.stopped_within < 15
    assert story.left_behind == []
    assert f"lightning-ray train resume={story.folder.name}" in story.first_output


def test_resumed_run_continues_the_step_count_and_ends(story):
    summary = read_summary(story.folder / "summary.json")
    assert summary.steps == STEPS
    assert [row["step"] for row in summary.extra["history"]] == [1, 2, 3, 4]
    # The first life trained three steps; its third is not in the checkpoint and is done again.
    assert re.findall(r"^step (\d)/4", story.first_output, re.M)[:3] == ["1", "2", "3"]
    assert re.findall(r"^step (\d)/4", story.second_output, re.M) == ["3", "4"]


def test_summary_has_what_the_run_came_to(story):
    summary = read_summary(story.folder / "summary.json")
    assert 0 <= summary.heldout_before <= 1 and 0 <= summary.heldout_after <= 1
    assert summary.train_seconds > 0 and summary.tokens_generated > 0
    assert (Path(summary.model_dir) / "model.safetensors").is_file()
    assert (story.folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert summary.extra["heldout_after_report"]["n"] == 16


def test_versions_continue_and_none_is_overwritten(story):
    summary = read_summary(story.folder / "summary.json")
    store = f"sqlite:///{story.folder.parent}/mlflow.db"
    versions = PolicyRegistry(store, "policy", summary.mlflow_run_id).versions()
    numbers = [version.number for version in versions]
    assert numbers == sorted(set(numbers)) and numbers[0] == 0
    by_step = {version.step: version for version in versions}
    assert by_step[4].number == numbers[-1] == summary.extra["version"]
    # Step 3 of the resumed life comes from the checkpoint's version, not from the lost one.
    assert by_step[3].parent == by_step[2].number
    assert by_step[3].number > by_step[2].number
    assert all(version.run_id == summary.mlflow_run_id for version in versions)


def test_resumed_steps_train_on_the_tasks_that_the_order_says(story):
    order = TaskOrder(load_tasks(TRAIN_FILE), seed=0)
    trained: dict[tuple[str, str], set[str]] = {}
    for row in _spans(story.folder):
        if row["kind"] == "resource" and row["rollout_id"].startswith("s0"):
            step, session = row["rollout_id"].split("-")[:2]
            task = json.loads(row["attributes"])["task_id"]
            trained.setdefault((step, session), set()).add(task)
    for (step, _), tasks in trained.items():
        position = (int(step[1:]) - 1) * TASKS
        expected = {task.id for task in order.take(position, TASKS)}
        # A step that Ctrl-C cut short has only some of its tasks.
        assert tasks == expected or (step == "s00004" and tasks < expected)
    sessions = {session for step, session in trained if step == "s00003"}
    assert len(sessions) == 2


def test_every_call_is_recorded_with_tokens_logprobs_and_version(story):
    rows = _spans(story.folder)
    calls = [row for row in rows if row["kind"] == "model_call"]
    assert len(calls) >= STEPS * TASKS * GROUP
    for call in calls:
        assert len(call["token_ids"]) > len(call["logprobs"]) > 0
        assert call["policy"] == "policy" and call["version"] >= 0
        assert call["role"] == "gpt-4o-mini" and call["status"] == "ok"
    assert len({row["span_id"] for row in rows}) == len(rows)
    rewards = {row["attempt_id"] for row in rows if row["kind"] == "reward"}
    assert {call["attempt_id"] for call in calls} >= rewards


def test_mlflow_holds_config_metrics_and_pictures(story):
    summary = read_summary(story.folder / "summary.json")
    client = MlflowClient(f"sqlite:///{story.folder.parent}/mlflow.db")
    run = client.get_run(summary.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.steps"] == str(STEPS)
    assert {m.step for m in client.get_metric_history(summary.mlflow_run_id, "reward")} >= {3, 4}
    names = {item.path for item in client.list_artifacts(summary.mlflow_run_id)}
    assert {"config.yaml", "learning_curve.png", "summary.json", "trajectories.html"} <= names
    page = (story.folder / "trajectories.html").read_text()
    assert "calc" in page


def test_staleness_is_zero_when_synchronous(story):
    summary = read_summary(story.folder / "summary.json")
    assert {row["staleness"] for row in summary.extra["history"]} == {0.0}


def test_shared_prefix_is_computed_once(story):
    summary = read_summary(story.folder / "summary.json")
    for row in summary.extra["history"]:
        if "tokens_batch" in row:
            assert row["tokens_computed"] < 0.6 * row["tokens_batch"]


def test_scores_of_each_held_out_task_can_be_read_from_the_spans(story):
    summary = read_summary(story.folder / "summary.json")
    scores = heldout_scores(story.folder / "spans")
    assert set(scores) == {0, STEPS}
    for step, mean in ((0, summary.heldout_before), (STEPS, summary.heldout_after)):
        rewards = scores[step].rewards["reward"]
        assert len(rewards) == 16 and fmean(rewards.values()) == pytest.approx(mean)


def _spans(folder: Path) -> list[dict]:
    tables = []
    for path in sorted((folder / "spans").glob("*.arrows")):
        scan = read_segment(path)
        tables += [pa.Table.from_batches([batch]) for _, batch in scan.batches]
    return pa.concat_tables(tables).to_pylist()
