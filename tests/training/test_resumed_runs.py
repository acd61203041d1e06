"""A run that is resumed has agents at work while its learner starts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_ray.agents import Task
from lightning_ray.jobs.compose import compose_config
from lightning_ray.rollouts import RolloutSpec
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Conductor, Parts, RunFolder, TrainConfig, check_train, parts
from lightning_ray.training.state import RunState


class Learner:
    """A group of learners that notes what is asked of it."""

    told: ClassVar[list[Any]] = []

    def __init__(self, *_: Any):
        self.told.append("learner")

    def load_checkpoint(self, path: Path, timeout_s: float) -> None:
        self.told.append(path.parent.name)

    def stop(self) -> None:
        """There is nothing to stop."""


class Queue:
    """Notes the questions of what is queued, in the order of the learner's notes."""

    def enqueue(self, specs: Sequence[RolloutSpec]) -> None:
        questions = [spec.task["question"] for spec in specs]
        Learner.told.append(list(dict.fromkeys(questions)))


def test_what_was_in_hand_is_queued_before_the_learner_starts_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LearnerGroup", Learner)
    monkeypatch.setattr(Learner, "told", [])
    settings = ["experiment=calculator", "training.tasks_per_step=3", "training.steps=9"]
    config = compose_config("train", TrainConfig, settings)
    check_train(config)
    folder = RunFolder.create(tmp_path, "run", settings)
    (folder.checkpoint(4) / "policy").mkdir(parents=True)
    state = RunState(step=4, position=8, in_hand=[2, 5])
    (folder.checkpoint(4) / "state.json").write_text(json.dumps(state.to_json()))
    tracked = TrackedRun.start(config.tracking, tmp_path, folder.run_id)
    tasks = [Task(f"t{number}", {"question": f"{number}?"}) for number in range(16)]
    with Progress(9, mode="plain") as progress:
        running = Parts(config, folder, tmp_path, progress)
        running.queue = Queue()  # type: ignore[assignment]
        uri = default_uri(tmp_path)
        conductor = Conductor(config, folder, running, tracked, uri, progress, tasks, [])
        conductor.resume(folder.checkpoint(4))
    (wanted, *then) = Learner.told
    order = [task for place in (2, 5, 8) for task in conductor._order.take(place, 1)]
    assert wanted == [task.data["question"] for task in order]
    assert then == ["learner", folder.checkpoint(4).name]
    # The training that follows waits for these, and queues no others.
    assert conductor._begun is not None and conductor._begun.in_hand == [2, 5, 8]
    conductor._begun.admit(4)
    assert len(Learner.told) == 3
