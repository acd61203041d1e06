"""Scoring a version beside training: nobody waits for it, and its rollouts are its own."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lightning_ray.agents import Task
from lightning_ray.errors import InfrastructureError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.rollouts import AttemptOutcome, AttemptStatus, QueueClient, start_queue
from lightning_ray.training import TrainConfig
from lightning_ray.training.beside import Beside

TASKS = [Task(f"t{n}", {"n": n}) for n in range(3)]


class Engines:
    """Takes on weights when it is let; fails where it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.fails = False
        self.given: list[tuple[str, int]] = []

    def update_weights(self, folder: str, version: int) -> float:
        assert self.go.wait(30)
        if self.fails:
            raise InfrastructureError("an engine did not take on the version")
        self.given.append((folder, version))
        return 0.0


class Bench:
    def __init__(self, folder: Path) -> None:
        config: TrainConfig = compose_config("train", TrainConfig, ["experiment=calculator"])
        self.queue: QueueClient = start_queue("run", config.rollouts, folder)
        self.engines = Engines()
        parts: Any = SimpleNamespace(queue=self.queue, beside={"policy": self.engines})
        self.beside = Beside(config, parts, TASKS)

    def begin(self, step: int, version: int) -> None:
        self.beside.begin(step, {"policy": (Path(f"versions/{version}"), version)})

    def work(self) -> list[str]:
        """Runs all that is queued, as a worker would; returns the rollouts."""
        done = []
        while (lease := ray.get(self.queue.actor.dequeue.remote(2.0), timeout=30)) is not None:
            outcome = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})
            ray.get(self.queue.actor.finish.remote(lease.attempt_id, outcome), timeout=30)
            done.append(lease.rollout_id)
        return done


@pytest.fixture
def bench(ray_cluster: None, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.engines.go.set()
    ray.kill(bench.queue.actor)


def test_nobody_waits_for_engines_or_rollouts_and_the_score_is_of_its_step(bench: Bench) -> None:
    begun = time.monotonic()
    bench.begin(4, 7)
    assert bench.beside.collect() is None and bench.beside.step == 4
    assert time.monotonic() - begun < 5, "the engines have not taken on anything yet"
    bench.engines.go.set()
    assert bench.beside.collect(0.1) is None
    names = bench.work()
    assert len(names) == len(TASKS) and bench.engines.given == [("versions/7", 7)]
    scored = bench.beside.collect(5)
    assert scored is not None and bench.beside.step is None
    assert (scored.step, scored.versions) == (4, {"policy": 7})
    assert [record.spec.rollout_id for record in scored.records] == sorted(names)
    assert {str(r.spec.answered_by) for r in scored.records} == {"{'policy': 'policy@evaluation'}"}
    assert {record.spec.priority for record in scored.records} == {-1}
    # The same step once more, after the run went back: other rollouts.
    bench.begin(4, 9)
    again = bench.work()
    assert len(again) == len(TASKS) and not set(again) & set(names)
    assert bench.beside.collect(5) is not None


def test_engines_that_fail_cost_the_score_and_nothing_else(bench: Bench) -> None:
    bench.engines.fails = True
    bench.engines.go.set()
    bench.begin(2, 3)
    with pytest.raises(InfrastructureError, match="did not take on"):
        bench.beside.collect(10)
    assert bench.beside.step is None and bench.beside.collect() is None
    bench.engines.fails = False
    bench.begin(4, 5)
    assert len(bench.work()) == len(TASKS)
    assert bench.beside.collect(5) is not None


@pytest.mark.parametrize("queued", [True, False])
def test_what_is_given_up_counts_for_nothing(bench: Bench, queued: bool) -> None:
    if queued:
        bench.engines.go.set()
    bench.begin(2, 3)
    if queued:
        assert bench.beside.collect(1.0) is None
    bench.beside.give_up()
    assert bench.beside.step is None and bench.beside.collect() is None
    bench.engines.go.set()
    assert bench.work() == []
