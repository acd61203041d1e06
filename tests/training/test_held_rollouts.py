"""Rollouts wait in the queue while no engine answers, and no longer than that."""

from pathlib import Path
from typing import Any

import pytest

from lightning_ray.agents import Task
from lightning_ray.jobs.compose import compose_config
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Conductor, Parts, RunFolder, TrainConfig, check_train
from lightning_ray.training.trainee import Lesson


class Engines:
    """A group whose only engine is dead until a version is handed over."""

    alive = 0

    def __init__(self) -> None:
        self.urls = ["http://127.0.0.1:1"]

    def mend(self) -> int:
        return 0


class Queue:
    """Notes when rollouts are held, and where the door is told that engines are."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def hold(self, held: bool) -> None:
        self.told.append(held)

    def engines_are_at(self, name: str, urls: list[str]) -> None:
        self.told.append(urls[0])


class Workers:
    """None of them dies."""

    def mend(self) -> int:
        return 0


class Learnt(Lesson):
    """A step that changed the weights."""

    learnt = True  # type: ignore[assignment]


def test_agents_begin_as_soon_as_an_engine_is_back_for_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config("train", TrainConfig, ["experiment=calculator"])
    check_train(config)
    folder = RunFolder.create(tmp_path, "run", [])
    tracked = TrackedRun.start(config.tracking, tmp_path, folder.run_id)
    with Progress(1, mode="plain") as progress:
        running = Parts(config, folder, tmp_path, progress)
        engines, queue = Engines(), Queue()
        running.groups = {"policy": engines}  # type: ignore[dict-item]
        running.queue, running.workers = queue, Workers()  # type: ignore[assignment]
        uri = default_uri(tmp_path)
        task = Task("t", {"question": "?"})
        conductor = Conductor(config, folder, running, tracked, uri, progress, [task], [])
        (trainee,) = conductor._trainees

        def publish(_state: Any, _step: int, mend: Any) -> None:
            mend()
            # Handing over waits for the engine, which has come up on another node.
            engines.alive, engines.urls = 1, ["http://127.0.0.1:2"]

        monkeypatch.setattr(trainee, "publish", publish)
        monkeypatch.setattr(trainee, "prune", lambda _needed: None)
        conductor._publish(1, {"policy": Learnt(None, None)})  # type: ignore[arg-type]
    assert queue.told == [True, "http://127.0.0.1:2", False]
