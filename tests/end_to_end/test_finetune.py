"""Supervised tuning on the real stack: the base model's own good samples raise its held-out score.

A run of one step samples with the base model through the whole stack; its right answers are what
the base model is then tuned on.
"""

import json
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_ray.policies import PolicyRegistry
from lightning_ray.spans import read_folder
from lightning_ray.tracking import read_summary
from lightning_ray.trajectories import rebuild_trees

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EPOCHS, BATCH = 4, 16


def folder_of(output: Path, name: str) -> Path:
    (folder,) = [path for path in output.glob(f"{name}-*") if (path / "overrides.json").is_file()]
    return folder


@pytest.fixture(scope="module")
def sampled(cli, tmp_path_factory) -> Path:
    """A run whose attempts, 256 and a few, are all the base model's."""
    output = tmp_path_factory.mktemp("outputs")
    done = cli.run(
        "train",
        "experiment=calculator",
        "name=sampled",
        f"output_dir={output}",
        "training.steps=1",
        "training.tasks_per_step=64",
        "algorithm.group_size=4",
        "evaluation.tasks=null",
        timeout=700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder_of(output, "sampled")


@pytest.fixture(scope="module")
def tuned(cli, sampled, few_heldout) -> tuple[Path, str]:
    """The folder of a tuning run on the right answers among them, and what it printed."""
    done = cli.run(
        "finetune",
        f"from={sampled.name}",
        "min_reward=1.0",
        "experiment=calculator",
        "name=tuned",
        f"output_dir={sampled.parent}",
        f"finetuning.epochs={EPOCHS}",
        f"finetuning.batch_size={BATCH}",
        f"evaluation.tasks={few_heldout}",
        "evaluation.samples_per_task=4",
        timeout=700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder_of(sampled.parent, "tuned-finetune"), done.stdout


def test_the_held_out_score_rises(tuned):
    summary = read_summary(tuned[0] / "summary.json")
    # 64 answers: two standard errors are 0.12.
    assert summary.heldout_before < 0.5
    assert summary.heldout_after > summary.heldout_before + 0.2
    losses = [row["loss"] for row in summary.extra["history"]]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_only_right_answers_were_learnt_each_once_an_epoch(sampled, tuned):
    summary = read_summary(tuned[0] / "summary.json")
    rows = read_folder(sampled / "spans").to_pylist()
    right = {r["attempt_id"] for r in rows if r["name"] == "reward" and r["value"] >= 1.0}
    trees, _ = rebuild_trees(read_folder(sampled / "spans"))
    calls = [tree.calls[0] for tree in trees if tree.attempt_id in right]
    distinct = {(call.prompt_length, call.tokens.tobytes()): len(call.logprobs) for call in calls}
    counts = summary.extra["samples"]
    attempts = {row["attempt_id"] for row in rows}
    # The step's, and those of the rehearsal before it.
    assert counts["chosen"] == len(right) and counts["attempts"] == len(attempts) >= 256
    assert counts["samples"] == len(distinct) and counts["tokens"] == sum(distinct.values())
    assert summary.extra["tokens_learnt"] == EPOCHS * counts["tokens"]
    assert summary.steps == EPOCHS * -(-len(distinct) // BATCH)
    assert f"chosen {len(right)} of {len(attempts)} attempts of {sampled.name}" in tuned[1]


def test_versions_have_their_lineage_and_the_run_its_figures(sampled, tuned):
    folder, printed = tuned
    summary = read_summary(folder / "summary.json")
    store = f"sqlite:///{folder.parent}/mlflow.db"
    versions = PolicyRegistry(store, "policy", summary.mlflow_run_id).versions()
    assert [(v.number, v.parent) for v in versions] == [(0, None), (1, 0), (2, 1), (3, 2), (4, 3)]
    assert versions[-1].created_by.startswith("finetune on ")
    assert versions[-1].created_by.endswith(sampled.name)
    assert versions[-1].path == Path(summary.model_dir)
    assert (versions[-1].path / "model.safetensors").is_file()
    client = MlflowClient(store)
    run = client.get_run(summary.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["finetuning.epochs"] == str(EPOCHS)
    assert run.data.params["samples.min_reward"] == "1.0"
    assert {"loss", "tokens_per_second", "heldout_reward"} <= run.data.metrics.keys()
    artifacts = {item.path for item in client.list_artifacts(summary.mlflow_run_id)}
    assert {"config.yaml", "learning_curve.png", "summary.json", "heldout.json"} <= artifacts
    assert re.search(r"^held-out score 0\.\d+ before, [01]\.\d+ after", printed, re.M)


def test_a_finished_run_is_tuned_further_from_its_checkpoint_without_an_agent(cli, tuned):
    folder, _ = tuned
    steps = read_summary(folder / "summary.json").steps
    done = cli.run(
        "finetune",
        f"resume={folder}",
        f"finetuning.epochs={EPOCHS + 1}",
        "evaluation.tasks=null",
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_summary(folder / "summary.json")
    assert summary.steps == steps + steps // EPOCHS and summary.extra["version"] == EPOCHS + 1
    assert [row["step"] for row in summary.extra["history"]] == list(range(1, summary.steps + 1))
    assert "vLLM" not in done.stdout
    assert json.loads((folder / "run.json").read_text())["mlflow_run_id"] == summary.mlflow_run_id
