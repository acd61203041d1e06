"""A sweep of two runs on the real stack: stopped by Ctrl-C in the first, gone on with, compared.

One story serves all tests of this file: Ray, Ray Serve, vLLM, DeepSpeed, MLflow, the real model.
"""

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from lightning_ray.jobs.sweep_folder import ChildStatus, SweepFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HELDOUT_TASKS = 6


@dataclass
class Story:
    """What was seen of the sweep."""

    output: Path
    stopped_within: float
    left_behind: list[str]
    stopped: SweepFolder
    finished: SweepFolder
    resumed_output: str
    compared_output: str
    compared: dict[str, Any]

    def client(self) -> MlflowClient:
        """Reads the store of the sweep."""
        return MlflowClient(f"sqlite:///{self.output}/mlflow.db")


@pytest.fixture(scope="module")
def story(cli, few_heldout, tmp_path_factory) -> Iterator[Story]:
    """Presses Ctrl-C while the first child starts Ray, goes on to the end, compares the two."""
    output = tmp_path_factory.mktemp("outputs")
    tasks = output / "heldout.jsonl"
    tasks.write_text("".join(few_heldout.read_text().splitlines(True)[:HELDOUT_TASKS]))
    process = cli.start(
        *("train", "--multirun", "experiment=calculator", f"output_dir={output}", "seed=0,1"),
        *("training.steps=1", "training.tasks_per_step=2", "algorithm.group_size=2"),
        f"evaluation.tasks={tasks}",
    )
    lines, family, pressed = [], [], 0.0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("starting Ray") and not family:
            family = psutil.Process(process.pid).children(recursive=True)
            pressed = time.monotonic()
            process.send_signal(signal.SIGINT)
    assert family, "".join(lines)
    assert process.wait(timeout=60) == 130, "".join(lines)
    stopped_within = time.monotonic() - pressed
    left = [p.name() for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    (name,) = re.findall(r"--multirun resume=(\S+)", "".join(lines))
    stopped = SweepFolder.find(output, name)

    root = f"output_dir={output}"
    resumed = cli.run("train", "--multirun", f"resume={name}", root, timeout=900)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    finished = SweepFolder.find(output, name)
    assert stopped is not None and finished is not None

    compared = cli.run("compare", name, root, "--json", str(output / "compared.json"))
    assert compared.returncode == 0, compared.stdout + compared.stderr
    found = json.loads((output / "compared.json").read_text())
    yield Story(
        output, stopped_within, left, stopped, finished, resumed.stdout, compared.stdout, found
    )


def test_ctrl_c_stops_the_sweep_and_the_run_that_is_under_way(story):
    assert story.stopped_within < 30
    assert story.left_behind == []
    assert [c.status for c in story.stopped.children] == [ChildStatus.STOPPED, ChildStatus.WAITING]


def test_a_sweep_that_is_gone_on_with_finishes_its_children_and_begins_none_twice(story):
    assert [child.status for child in story.finished.children] == [ChildStatus.FINISHED] * 2
    assert story.finished.children[0].run == story.stopped.children[0].run
    runs = {path.parent.name for path in story.output.glob("*/overrides.json")}
    assert runs == {child.run for child in story.finished.children}


def test_the_runs_hang_below_the_sweep_in_mlflow(story):
    client = story.client()
    parent = client.get_run(story.finished.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["multirun.seed"] == "0,1"
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"learning_curves.png", "children.txt"} <= names
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {run.info.run_name for run in children} == {c.run for c in story.finished.children}
    assert {run.data.params["seed"] for run in children} == {"0", "1"}
    assert {run.info.status for run in children} == {"FINISHED"}


def test_the_table_at_the_end_has_what_each_run_came_to(story):
    rows = re.findall(r"^ +(\d) +([01]) .* finished +(\S+)", story.resumed_output, re.M)
    assert rows == [("1", "0", story.finished.children[0].run), ("2", "1", rows[1][2])]
    score, gain, seconds = r"[01]\.\d{3}", r"[+-][01]\.\d{3}", r"\d+"
    assert re.search(rf"{score} +{score} +{gain} +{seconds} +finished", story.resumed_output)


def test_compare_names_what_differs_and_nothing_else(story):
    seeds = {key: ["0", "1"] for key in ("seed", "training.seed", "inference.seed", "learner.seed")}
    assert story.compared["configuration"] == seeds
    assert re.search(r"^learner\.seed +0 +1$", story.compared_output, re.M)
    assert [run["typed"] for run in story.compared["runs"]] == ["seed=0", "seed=1"]
    assert [run["missing"] for run in story.compared["runs"]] == [[], []]


def test_compare_measures_the_difference_over_the_same_tasks(story):
    reward = story.compared["heldout"][0]
    assert reward["measure"] == "reward"
    difference = reward["difference"][1]
    assert difference["paired"] and difference["interval"]["n"] == HELDOUT_TASKS
    first, second = reward["after"]
    assert difference["interval"]["mean"] == pytest.approx(second - first)
    assert story.compared["figures"]["steps"] == [1, 1]
    assert all(tokens > 0 for tokens in story.compared["figures"]["tokens_sampled"])
    assert f"B - A: {second - first:+.3f}" in story.compared_output
    for run in story.compared["runs"]:
        assert run["versions"][0]["chain"][0] == 0


def test_the_picture_lies_where_the_output_says_and_in_both_mlflow_runs(story):
    picture = Path(story.compared["picture"])
    assert str(picture) in story.compared_output
    assert picture.read_bytes().startswith(b"\x89PNG")
    for run in story.compared["runs"]:
        (place,) = story.client().list_artifacts(run["mlflow_run_id"], "comparisons")
        files = story.client().list_artifacts(run["mlflow_run_id"], place.path)
        assert {Path(file.path).name for file in files} == {picture.name, "comparison.json"}
