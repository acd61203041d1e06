"""A run whose versions are adapters: trained, resumed from one, evaluated and released."""

from pathlib import Path

import pytest

from lightning_ray.cluster.processor import multiplies_bfloat16
from lightning_ray.policies import PolicyRegistry
from lightning_ray.policies.adapters import read_adapter
from lightning_ray.tracking import read_summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

AGREED = 0.02 if multiplies_bfloat16() else 0.001
"""Mean |logprob of the engine - logprob of the learner|, at most, where they are one policy."""


@pytest.fixture(scope="module")
def run(cli, few_heldout, tmp_path_factory) -> Path:
    """One step, and another one after a resume, whose engine starts from the first one's version.

    The learning rate is such that a step changes the policy by much more than AGREED.
    """
    output = tmp_path_factory.mktemp("outputs")
    done = cli.run(
        "train",
        "experiment=calculator",
        f"output_dir={output}",
        "training.steps=1",
        "training.tasks_per_step=3",
        "training.checkpoint_every=1",
        "learner.lora.rank=8",
        "learner.lora.publish=adapter",
        "learner.learning_rate=2e-3",
        f"evaluation.tasks={few_heldout}",
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = [path for path in output.iterdir() if (path / "overrides.json").is_file()]
    done = cli.run("train", f"resume={folder}", "training.steps=2", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_version_is_its_additions_alone(run, real_model):
    summary = read_summary(run / "summary.json")
    store = f"sqlite:///{run.parent}/mlflow.db"
    versions = PolicyRegistry(store, "policy", summary.mlflow_run_id).versions()
    assert [version.kind for version in versions] == ["weights", "adapter", "adapter"]
    for version in versions[1:]:
        adapter = read_adapter(version.path)
        assert adapter is not None and adapter.base == real_model
        assert sum(path.stat().st_size for path in version.path.iterdir()) < 15_000_000


def test_the_engine_is_the_learners_policy_also_after_a_resume(run):
    history = read_summary(run / "summary.json").extra["history"]
    assert [row["step"] for row in history] == [1, 2]
    assert all(row["logprob_abs_difference"] <= AGREED for row in history)


def test_such_a_version_is_evaluated_and_released(run, cli):
    done = cli.run("evaluate", f"run={run}", "version=2", "against=1", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    output = f"output_dir={run.parent}"
    done = cli.run("release", "promote", "policy", "latest", output)
    assert done.returncode == 0, done.stdout + done.stderr
    done = cli.run("release", "status", output)
    assert done.returncode == 0 and "present" in done.stdout and "removed" not in done.stdout
