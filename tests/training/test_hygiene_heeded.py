"""What the conductor does about the checks of a step, before anything is learnt from it."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_step_batches import batch_of, one_of_each

from lightning_ray.agents import Task
from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Conductor, Parts, RunFolder, TrainConfig, check_train
from lightning_ray.trajectories import HygienePolicy


def test_a_check_that_says_to_stop_ends_the_run_and_leaves_what_it_found(
    tmp_path: Path, capsys
) -> None:
    config = compose_config("train", TrainConfig, ["experiment=calculator"])
    check_train(config)
    folder = RunFolder.create(tmp_path, "run", [])
    tracked = TrackedRun.start(config.tracking, tmp_path, folder.run_id)
    uri = default_uri(tmp_path)
    task = Task("t", {"question": "?"})
    with Progress(1, mode="plain") as progress:
        parts = Parts(config, folder, tmp_path, progress)
        conductor = Conductor(config, folder, parts, tracked, uri, progress, [task], [])
        _, harmless = batch_of(*one_of_each())
        conductor._heed(1, {"policy": harmless})
        _, stopping = batch_of(*one_of_each(), infrastructure_faults=HygienePolicy.stop)
        with pytest.raises(UserError) as raised:
            conductor._heed(2, {"policy": stopping})
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert (
        "hygiene.infrastructure_faults=stop: 2 attempts in step 2; the first, crashed/1" in message
    )
    assert "leave them out with hygiene.infrastructure_faults=drop" in message
    # Each check is told of once.
    assert capsys.readouterr().out.count("hygiene: cut_traces (warn)") == 1
    kept = json.loads(folder.hygiene.read_text())
    assert kept["offenders"]["infrastructure_faults"][0]["attempt_ids"] == ["crashed/1"]
    client = MlflowClient(default_uri(tmp_path))
    logged = client.get_metric_history(tracked.run_id, "hygiene_infrastructure_faults")
    assert [(metric.step, metric.value) for metric in logged] == [(2, 2.0)]
    assert "hygiene.json" in {item.path for item in client.list_artifacts(tracked.run_id)}
