"""Supervised tuning with a real learner on a tiny model: stopped and resumed, it ends the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from learner_support import tiny_model, to_table

from lightning_ray.learner import LearnerConfig, LearnerGroup
from lightning_ray.policies import PolicyRegistry
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import RunFolder, RunState
from lightning_ray.training.checkpoints import Checkpoints
from lightning_ray.training.finetuning import FinetuneConfig
from lightning_ray.training.selection import Counts, Samples
from lightning_ray.training.tuner import Tuner
from lightning_ray.training.versions import Versions
from lightning_ray.trajectories import with_advantages

COUNT, TOKENS = 5, 4


def samples() -> Samples:
    rows = [
        {"token_ids": [1, 2, 3, n, n + 1, n + 2, n + 3], "trainable": [False] * 3 + [True] * TOKENS}
        for n in range(COUNT)
    ]
    table = to_table(rows)
    table = with_advantages(table, dict.fromkeys(table["attempt_id"].to_pylist(), 1.0))
    counts = Counts(COUNT, COUNT, 0, 0, 0, 0, 0, 0, COUNT, COUNT * TOKENS)
    return Samples(table, counts, ("earlier",), "digest")


class StopsAfter(Progress):
    """Ctrl-C, as soon as a step is done."""

    def __init__(self, step: int | None):
        super().__init__(6, mode="plain")
        self._stop = step

    def step_done(self, step: int, metrics: Any) -> None:
        if step == self._stop:
            raise KeyboardInterrupt


class Job:
    def __init__(self, root: Path, model: Path, name: str):
        self.config = FinetuneConfig(name=name, output_dir=str(root))
        self.config.finetuning.epochs, self.config.finetuning.batch_size = 2, 2
        self.config.training.checkpoint_every = 2
        self.config.learner = LearnerConfig(dtype="fp32", learning_rate=1e-2, num_threads=1)
        self.model = model
        self.folder = RunFolder.create(root, name, [])
        self.tracked = TrackedRun.start(self.config.tracking, root, name)
        self.registry = PolicyRegistry(default_uri(root), "policy", self.tracked.run_id)
        self.versions = Versions(self.config.policy, self.folder, self.registry)

    @contextmanager
    def learner(self) -> Iterator[LearnerGroup]:
        group = LearnerGroup(self.config.learner, self.model, self.folder.run_id)
        try:
            yield group
        finally:
            group.stop()

    def tuner(self, stop_after: int | None = None) -> Tuner:
        progress = StopsAfter(stop_after)
        return Tuner(
            self.config, self.folder, self.versions, self.tracked, progress, samples(), self.model
        )


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    ray_cluster: None, tmp_path: Path
) -> None:
    model = tiny_model(tmp_path / "model")
    whole, stopped = Job(tmp_path, model, "whole"), Job(tmp_path, model, "stopped")
    state = RunState()
    taken: list[int] = []
    with whole.learner() as learner:
        # Five samples in batches of two: three steps an epoch, and a version at its end.
        whole.tuner().train(learner, state, lambda _, version: taken.append(version))
    losses = [row["loss"] for row in state.history]
    assert (state.step, state.of("policy").version, taken) == (6, 2, [1, 2]) and losses[
        -1
    ] < 0.8 * losses[0]
    assert sum(row["sampled_tokens"] for row in state.history) == 2 * COUNT * TOKENS
    assert [row["epoch"] for row in state.history[2::3]] == [1.0, 2.0]
    versions = whole.registry.versions()
    assert [(v.number, v.parent, v.step) for v in versions] == [(0, None, 0), (1, 0, 3), (2, 1, 6)]
    assert versions[1].created_by == "finetune on 5 samples of earlier"
    assert [row["loss"] for row in whole.tracked.history(["loss"])] == pytest.approx(losses)

    with stopped.learner() as learner, pytest.raises(KeyboardInterrupt):
        stopped.tuner(stop_after=3).train(learner, RunState(), None)
    checkpoint = stopped.folder.last_checkpoint()
    assert checkpoint is not None
    resumed = Checkpoints.peek(checkpoint)
    assert (resumed.step, resumed.of("policy").version) == (2, 0)
    with stopped.learner() as learner:
        assert Checkpoints(stopped.folder, 2).load(checkpoint, {"policy": learner}) == resumed
        stopped.tuner().train(learner, resumed, None)
    # Version 1 was made before the stop, and keeps its number.
    numbers = [(v.number, v.parent) for v in stopped.registry.versions()]
    assert numbers == [(0, None), (1, 0), (2, 0), (3, 2)] and resumed.of("policy").version == 3
    weights = [
        (job.folder.version("policy", number) / "model.safetensors").read_bytes()
        for job, number in ((whole, 2), (stopped, 3))
    ]
    assert weights[0] == weights[1]
