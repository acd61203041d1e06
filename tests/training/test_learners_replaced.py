"""Another learner in place of one that died, when the other dies too while it starts."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_ray.agents import Task
from lightning_ray.errors import PartLostError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import Conductor, Parts, RunFolder, TrainConfig, check_train, parts


class Learner:
    """A group of learners, of which some die when they start."""

    made: ClassVar[list["Learner"]] = []
    dying = 0

    def __init__(self, *_: Any):
        self.lost, self.stopped = False, False
        self.made.append(self)
        if Learner.dying:
            Learner.dying -= 1
            raise PartLostError("a learner actor was lost while it started")

    def settle(self, timeout_s: float) -> None:
        raise PartLostError("nothing is written any more")

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize("version_pending", [False, True])
def test_a_learner_that_dies_while_it_takes_the_place_of_another_is_replaced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version_pending: bool
) -> None:
    monkeypatch.setattr(parts, "LearnerGroup", Learner)
    monkeypatch.setattr(Learner, "made", [])
    config = compose_config("train", TrainConfig, ["experiment=calculator"])
    check_train(config)
    folder = RunFolder.create(tmp_path, "run", [])
    tracked = TrackedRun.start(config.tracking, tmp_path, folder.run_id)
    task = Task("t", {"question": "?"})
    with Progress(1, mode="plain") as progress:
        running = Parts(config, folder, tmp_path, progress)
        uri = default_uri(tmp_path)
        conductor = Conductor(config, folder, running, tracked, uri, progress, [task], [])
        (trainee,) = conductor._trainees
        running.start_learners()
        first = running.learners["policy"]
        first.lost = True
        if version_pending:
            trainee._unsettled = (1, 0, 1, "checksum")
        Learner.dying = 2
        for _ in range(2):
            trainee.give_up()
            with pytest.raises(PartLostError):
                running.replace_learners()
        trainee.give_up()
        running.replace_learners()
    last = running.learners["policy"]
    assert last is Learner.made[-1] and len(Learner.made) == 4
    assert first.stopped and not last.stopped and not last.lost
