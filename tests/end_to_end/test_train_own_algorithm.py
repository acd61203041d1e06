"""The example of docs/own-algorithm.md, copied from the page, trains on the real stack."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from own_algorithm_support import examples

from lightning_ray.policies import PolicyRegistry
from lightning_ray.spans import SpanKind, query, read_folder
from lightning_ray.tracking import read_summary

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, TASKS, GROUP = 2, 4, 8


@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory) -> Path:
    """A run typed in a folder that has the example, and nothing else of the user's."""
    here = tmp_path_factory.mktemp("mine")
    (here / "my_algorithm.py").write_text(examples()["LeaveOneOut"])
    (here / "examples").symlink_to(ROOT / "examples")
    words = [
        "train",
        "experiment=calculator",
        "algorithm.name=my_algorithm:LeaveOneOut",
        "+algorithm.options.most=1.5",
        "output_dir=outputs",
        f"training.steps={STEPS}",
        f"training.tasks_per_step={TASKS}",
        f"algorithm.group_size={GROUP}",
        "evaluation.tasks=null",
    ]
    done = subprocess.run(
        [str(cli.program), *words],
        cwd=here,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (here / "outputs").glob("calculator-*")
    return folder


def test_its_credit_and_its_loss_are_what_was_trained_with(trained):
    summary = read_summary(trained / "summary.json")
    first = summary.extra["history"][0]
    # What the step should have come to, from the spans alone: the learner's logprobs are those
    # that were recorded, to rounding, and every ratio is near 1.
    spans = read_folder(trained / "spans")
    rows = query(
        spans,
        "SELECT rollout_id, any_value(attributes->>'group_id') AS task, "
        "max(value) FILTER (WHERE name = 'reward') AS reward, "
        "flatten(list(logprobs) FILTER (WHERE kind = ?)) AS logprobs "
        "FROM spans WHERE rollout_id LIKE 's00001-%' GROUP BY rollout_id",
        [SpanKind.MODEL_CALL.value],
    ).to_pylist()
    terms = []
    for task in {row["task"] for row in rows}:
        group = [row for row in rows if row["task"] == task]
        rewards = np.array([row["reward"] for row in group])
        credit = rewards - (rewards.sum() - rewards) / (len(group) - 1)
        if credit.any():
            for row, advantage in zip(group, credit, strict=True):
                terms += [-advantage * logprob for logprob in row["logprobs"]]
    assert len(rows) == TASKS * GROUP and terms
    assert first["loss"] == pytest.approx(np.mean(terms), abs=0.02)
    assert first["clip_fraction"] == 0.0


def test_the_versions_say_what_made_them(trained):
    summary = read_summary(trained / "summary.json")
    store = f"sqlite:///{trained.parent}/mlflow.db"
    versions = PolicyRegistry(store, "policy", summary.mlflow_run_id).versions()
    assert versions[-1].created_by == "my_algorithm:LeaveOneOut"
    assert summary.steps == STEPS and summary.extra["version"] >= 1
