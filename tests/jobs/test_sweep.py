"""A sweep without training: what it expands to, what it refuses, and children that fail."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import compose_config, expand_sweep
from lightning_ray.jobs.sweep import sweep
from lightning_ray.jobs.sweep_folder import Child, ChildStatus, SweepFolder, label, swept_keys
from lightning_ray.training import TrainConfig, check_train


def check(overrides: list[str]) -> TrainConfig:
    config = compose_config("train", TrainConfig, overrides)
    check_train(config)
    return config


def test_choices_and_ranges_are_multiplied_in_the_order_typed() -> None:
    children = expand_sweep(["experiment=calculator", "seed=range(2)", "algorithm.group_size=4,8"])
    assert children == [
        ["experiment=calculator", f"seed={seed}", f"algorithm.group_size={size}"]
        for seed in (0, 1)
        for size in (4, 8)
    ]
    assert swept_keys(children) == ["seed", "algorithm.group_size"]
    assert label(children[1], swept_keys(children)) == "seed=0, group_size=8"


def test_a_glob_matches_the_options_of_a_group() -> None:
    children = expand_sweep(["learner=glob(*)"])
    assert children == [["learner=cpu"], ["learner=gpu"]]


def test_what_is_quoted_is_one_value_and_comes_through_as_typed() -> None:
    (first, second) = expand_sweep(
        ["experiment=calculator", "name=a,b", "agent.command=[python,'my agent.py']"]
    )
    assert check(first).agent.command == check(second).agent.command == ["python", "my agent.py"]
    (only,) = expand_sweep(["experiment=calculator", "training.tasks='a,b:c.jsonl'"])
    assert check(only).training.tasks == "a,b:c.jsonl"


def test_secrets_do_not_reach_what_is_shown_of_a_child() -> None:
    children = [["gateway.api_key=sk-1", "seed=1"], ["gateway.api_key=sk-2", "seed=1"]]
    assert label(children[0], swept_keys(children)) == "api_key=***"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=range(0)", "seed=range(0): matches nothing"),
        ("experiment=glob(nothing*)", "experiment=glob(nothing*): matches nothing"),
        ("seed=interval(0,1)", "INTERVAL"),
        ("seed", "KEY=VALUE"),
        ("seed=[1", "seed=[1"),
    ],
)
def test_a_sweep_that_cannot_be_expanded_is_refused_in_one_line(override: str, named: str) -> None:
    with pytest.raises(UserError) as refused:
        expand_sweep([override])
    assert named in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_several_values_without_multirun_say_how_to_run_them() -> None:
    with pytest.raises(UserError, match=r"'seed=0,1'.*--multirun"):
        check(["experiment=calculator", "seed=0,1"])


def test_every_mistake_is_one_line_and_nothing_has_begun(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=calculator", f"output_dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        sweep("train", ["-m", *words, "seed=0,-1,1", "algorithm.group_size=1,4"], check)
    assert ended.value.code == 2
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("error: child 1, 5: algorithm.group_size: 1 ")
    assert second.startswith("error: child 3, 4: seed=-1")
    with pytest.raises(SystemExit):
        sweep("train", ["-m", *words, "seed=0,1", "training.step=3"], check)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: every child: ") and "training.step" in line
    assert list(tmp_path.iterdir()) == []


def test_the_children_of_a_sweep_lie_in_one_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir, .* one value"):
        words = ["experiment=calculator", f"output_dir={tmp_path}/a,{tmp_path}/b"]
        sweep("train", ["--multirun", *words], check)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_sweep_is_refused_with_those_there_are(tmp_path: Path) -> None:
    folder = SweepFolder.create(tmp_path, "calc", [], [["seed=0"]])
    root = f"output_dir={tmp_path}"
    with pytest.raises(UserError, match=rf"no such sweep.*{folder.sweep_id}"):
        sweep("train", ["--multirun", "resume=yesterday", root], check)
    with pytest.raises(UserError, match="goes on with the settings it was begun with"):
        sweep("train", ["--multirun", f"resume={folder.sweep_id}", "seed=1", root], check)


def test_a_sweep_whose_child_still_runs_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = SweepFolder.create(tmp_path, "calc", [], [["experiment=calculator"]])
    words = ["--multirun", f"resume={folder.path}", f"output_dir={tmp_path}"]
    child = folder.children[0]
    child.process = (os.getpid(), psutil.Process().create_time())
    child.status = ChildStatus.RUNNING
    folder.save()
    with pytest.raises(UserError, match=f"child 1 .* still runs as process {os.getpid()}"):
        sweep("train", words, check)
    # The number alone may be another process's by now.
    assert not Child(1, [], process=(os.getpid(), 0.0)).alive()
    child.process, child.status = None, ChildStatus.FINISHED
    folder.save()
    with pytest.raises(UserError, match=r"every child .* has finished"):
        sweep("train", words, check)


@dataclass
class Failed:
    """A sweep of which every child fails once it has begun."""

    done: subprocess.CompletedProcess[str]
    output: Path

    @property
    def folder(self) -> SweepFolder:
        """The sweep's own folder."""
        (path,) = self.output.glob("*/sweep.json")
        found = SweepFolder.find(self.output, path.parent.name)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def failed(cli, tmp_path_factory) -> Failed:
    """Two children that find no Ray cluster: neither Ray nor an engine is started."""
    output = tmp_path_factory.mktemp("outputs")
    words = ["experiment=calculator", "cluster=ray", "cluster.address=127.0.0.1:1"]
    done = cli.run("train", "--multirun", *words, "seed=3,4", f"output_dir={output}", timeout=300)
    return Failed(done, output)


@pytest.mark.slow
def test_a_child_that_fails_is_reported_and_the_others_go_on(failed: Failed) -> None:
    assert failed.done.returncode == 1
    reasons = re.findall(r"^child (\d) failed: (.*)$", failed.done.stdout, re.M)
    assert [number for number, _ in reasons] == ["1", "2"]
    assert all("no Ray cluster answers there" in reason for _, reason in reasons)
    assert len(re.findall(r"^ +\d +[34] .*failed", failed.done.stdout, re.M)) == 2
    assert f"--multirun resume={failed.folder.sweep_id}" in failed.done.stdout
    assert "Traceback" not in failed.done.stdout + failed.done.stderr


@pytest.mark.slow
def test_each_child_is_a_run_below_the_sweeps_in_mlflow(failed: Failed) -> None:
    folder = failed.folder
    client = MlflowClient(f"sqlite:///{failed.output}/mlflow.db")
    parent = client.get_run(folder.mlflow_run_id)
    assert (parent.info.run_name, parent.info.status) == (folder.sweep_id, "FAILED")
    for child, seed in zip(folder.children, "34", strict=True):
        facts = json.loads((failed.output / str(child.run) / "run.json").read_text())
        run = client.get_run(facts["mlflow_run_id"])
        assert run.info.run_name == child.run and run.info.status == "FAILED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["seed"] == seed and facts["base_model"]
    assert [child.status for child in folder.children] == [ChildStatus.FAILED] * 2
