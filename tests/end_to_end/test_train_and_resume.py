"""The main job on the real stack: trained a few steps, stopped by Ctrl-C, resumed, and evaluated.

One run serves all tests of this file: Ray, Ray Serve, vLLM, DeepSpeed, MLflow and the real model.
Its agent is the example's, except that it crashes on one task of the first step.
"""

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import psutil
import pytest
from mlflow import MlflowClient

from lightning_ray.agents import load_tasks
from lightning_ray.evaluation import heldout_scores
from lightning_ray.policies import PolicyRegistry
from lightning_ray.spans import read_folder
from lightning_ray.tracking import read_summary
from lightning_ray.training.order import TaskOrder

# Two starts of the whole stack, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1500)

# With 8 samples of a task it is all but certain that every step has something to learn.
STEPS, TASKS, GROUP = 4, 3, 8
TRAIN_FILE = "examples/calculator/train.jsonl"

CRASHING = """
import runpy, sys
if sys.argv[1] == {question!r}:
    raise RuntimeError("injected fault")
runpy.run_path("examples/calculator/agent.py", run_name="__main__")
"""


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
    agent = tmp_path_factory.mktemp("agent") / "agent.py"
    (unlucky,) = TaskOrder(load_tasks(TRAIN_FILE), seed=0).take(0, 1)
    agent.write_text(CRASHING.format(question=unlucky.data["question"]))
    process = cli.start(
        "train",
        "experiment=calculator",
        f"output_dir={output}",
        f'agent.command=[python,{agent},"{{question}}"]',
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
    assert len(calls) >= (STEPS * TASKS - 1) * GROUP
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
    assert {
        "config.yaml",
        "learning_curve.png",
        "summary.json",
        "trajectories-policy.html",
    } <= names
    assert {"evaluation.json", "evaluation.html"} <= names
    assert "hygiene.json" in names
    page = (story.folder / "trajectories-policy.html").read_text()
    assert "calc" in page


def test_staleness_is_zero_when_synchronous(story):
    summary = read_summary(story.folder / "summary.json")
    assert {row["staleness"] for row in summary.extra["history"]} == {0.0}


def test_shared_prefix_is_computed_once(story):
    summary = read_summary(story.folder / "summary.json")
    for row in summary.extra["history"]:
        if "tokens_batch" in row:
            assert row["tokens_computed"] < 0.6 * row["tokens_batch"]


@pytest.fixture(scope="module")
def evaluated(cli, story) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run's last version against its base, on the run's own held-out tasks."""
    done = cli.run(
        "evaluate",
        f"run={story.folder}",
        "against=0",
        "gate.max_failed=0",
        # After four steps no version is perfect.
        "gate.min_completion=1",
        timeout=600,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    (folder,) = story.folder.parent.glob("calculator-evaluate-*")
    return folder, done


@pytest.mark.slow
def test_evaluation_runs_each_task_on_both_versions(story, evaluated):
    folder, done = evaluated
    last = read_summary(story.folder / "summary.json").extra["version"]
    assert "DeepSpeed" not in done.stdout
    sampled: dict[str, set[int]] = {}
    tasks: dict[str, list[str]] = {}
    for row in _spans(folder):
        prefix = row["rollout_id"].split("-")[0]
        if row["kind"] == "model_call":
            sampled.setdefault(prefix, set()).add(row["version"])
        if row["kind"] == "resource":
            tasks.setdefault(prefix, []).append(json.loads(row["attributes"])["task_id"])
    assert sampled == {f"v{last:05d}": {last}, "v00000": {0}}
    expected = [f"heldout-{number:04d}" for number in range(16)]
    assert {prefix: sorted(ids) for prefix, ids in tasks.items()} == dict.fromkeys(
        sampled, expected
    )


@pytest.mark.slow
def test_evaluation_reports_measures_pairs_and_gates(story, evaluated):
    folder, done = evaluated
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["about"]["version"] == read_summary(story.folder / "summary.json").extra["version"]
    for side in (found["subject"], found["against"]):
        assert (side["rollouts"], side["failed"]) == (16, 0)
        assert 0 <= side["measures"]["completion_quality"]["value"] < 1
        assert side["measures"]["tool_discipline"]["not_measurable"] == "no tool_call spans"
    compared = found["comparison"]
    assert compared["wins"] + compared["ties"] + compared["losses"] == 16
    means = [
        side["measures"]["completion_quality"]["value"]
        for side in (found["subject"], found["against"])
    ]
    assert compared["difference"]["mean"] == pytest.approx(means[0] - means[1])
    gates = {gate["name"]: gate["passed"] for gate in found["gates"]}
    assert gates == {"max_failed": True, "min_completion": False}
    assert done.stderr.startswith("gate failed: min_completion=1: completion quality")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_evaluation_is_an_mlflow_run_of_its_own(story, evaluated):
    folder, _ = evaluated
    client = MlflowClient(f"sqlite:///{story.folder.parent}/mlflow.db")
    run = client.get_run(json.loads((folder / "run.json").read_text())["mlflow_run_id"])
    assert run.info.run_id != read_summary(story.folder / "summary.json").mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["lightning_ray.job"] == "evaluate"
    found = json.loads((folder / "evaluation.json").read_text())
    quality = found["subject"]["measures"]["completion_quality"]["value"]
    assert run.data.metrics["completion_quality"] == pytest.approx(quality)
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "evaluation.json", "evaluation.html"} <= names
    assert "heldout-0" in (folder / "evaluation.html").read_text()


def test_a_task_on_which_the_agent_crashes_is_left_out_and_counted(story):
    history = read_summary(story.folder / "summary.json").extra["history"]
    rest = [0] * (STEPS - 1)
    # Every rollout of it was tried twice.
    assert [row["hygiene_infrastructure_faults"] for row in history] == [2 * GROUP, *rest]
    assert [row["left_out"] for row in history] == [GROUP, *rest]
    assert history[0]["groups_used"] + history[0]["groups_flat"] == TASKS - 1
    kept = json.loads((story.folder / "hygiene.json").read_text())["offenders"]
    for entry in kept["infrastructure_faults"]:
        assert entry["step"] == 1 and entry["attempt_ids"][0].startswith("s00001-")
        assert "exit code 1" in entry["reason"] and "injected fault" in entry["reason"]


def test_the_checks_of_every_step_are_in_the_run(story):
    summary = read_summary(story.folder / "summary.json")
    totals = summary.extra["hygiene"]
    assert json.loads((story.folder / "hygiene.json").read_text())["totals"] == totals
    for name, total in totals.items():
        assert total == sum(row[f"hygiene_{name}"] for row in summary.extra["history"]), name
    assert totals["constant_groups"] == sum(row["groups_flat"] for row in summary.extra["history"])
    for name in ("inexact_tokens", "empty_traces", "missing_rewards", "contradictory_rewards"):
        assert totals[name] == 0
    assert totals["leakage"] == totals["duplicate_spans"] == totals["duplicate_tasks"] == 0
    assert f"{2 * GROUP} infrastructure_faults" in story.second_output
    client = MlflowClient(f"sqlite:///{story.folder.parent}/mlflow.db")
    for name in totals:
        logged = client.get_metric_history(summary.mlflow_run_id, f"hygiene_{name}")
        assert {metric.step for metric in logged} == set(range(1, STEPS + 1))


def test_spans_check_says_the_same_of_the_runs_folder(story, cli, few_heldout, tmp_path):
    command = ["spans", "check", story.folder.name, f"output_dir={story.folder.parent}"]
    found = tmp_path / "found.json"
    done = cli.run(*command, f"heldout={few_heldout}", "--json", str(found))
    assert done.returncode == 0, done.stdout + done.stderr
    totals = json.loads(found.read_text())["totals"]
    # Ctrl-C may have failed some more.
    assert totals["infrastructure_faults"] >= 2 * GROUP
    for name in ("inexact_tokens", "empty_traces", "missing_rewards", "contradictory_rewards"):
        assert totals[name] == 0
    assert totals["leakage"] == totals["duplicate_spans"] == totals["duplicate_tasks"] == 0
    summary = read_summary(story.folder / "summary.json")
    # It sees the step that was lost with Ctrl-C as well.
    assert totals["constant_groups"] >= summary.extra["hygiene"]["constant_groups"]
    stopped = cli.run(*command, "hygiene.infrastructure_faults=stop")
    assert stopped.returncode == 3


def test_scores_of_each_held_out_task_can_be_read_from_the_spans(story):
    summary = read_summary(story.folder / "summary.json")
    scores = heldout_scores(story.folder / "spans")
    assert set(scores) == {0, STEPS}
    for step, mean in ((0, summary.heldout_before), (STEPS, summary.heldout_after)):
        rewards = scores[step].rewards["reward"]
        assert len(rewards) == 16 and fmean(rewards.values()) == pytest.approx(mean)


def _spans(folder: Path) -> list[dict]:
    return read_folder(folder / "spans").to_pylist()
