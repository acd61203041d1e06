"""A run over several Ray nodes, of which any may be lost, and so may every other part."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pytest

from benchmarks.dying import DEATHS, STALENESS, TASKS, WITHIN_S, Death, Run
from benchmarks.nodes import Nodes
from lightning_ray.policies import PolicyRegistry
from lightning_ray.spans import read_folder
from lightning_ray.tracking import RunSummary, read_summary
from lightning_ray.tracking.store import default_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = len(DEATHS) + 4 + STALENESS + 2
"""Rollouts still begin after the last death, also where some take more than a step to make good."""


@dataclass
class Story:
    """What was seen of the run."""

    run: Run
    folder: Path
    deaths: list[Death]
    summary: RunSummary


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes.start()
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def story(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Trains asynchronously while one part after the other dies, each at a random moment."""
    run = Run(tmp_path_factory.mktemp("outputs"), nodes, STEPS)
    chance = random.Random()
    deaths = []
    run.start("experiment=calculator")
    try:
        for step, name in enumerate(chance.sample(list(DEATHS), len(DEATHS)), 1):
            run.wait_for_step(step, 600)
            time.sleep(chance.uniform(0, 5))
            deaths.append(run.die(name))
        code = run.wait(600)
    finally:
        run.process.kill()
    assert code == 0, run.output
    folder = run.run_folder.path
    return Story(run, folder, deaths, read_summary(folder / "summary.json"))


def test_the_run_goes_on_to_its_end_whatever_is_lost(story: Story) -> None:
    print(story.run.output)
    history = story.summary.extra["history"]
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))


def test_what_died_is_made_good_in_time(story: Story) -> None:
    took = {
        death.name: seconds
        for death, seconds in zip(story.deaths, story.run.recovered(story.deaths), strict=True)
    }
    patience = story.run.patience
    told = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())
    print(f"{told}; {patience:.2f} times the limits")
    assert {name: s for name, s in took.items() if s > WITHIN_S[name] * patience} == {}


def test_every_task_is_trained_on_once(story: Story) -> None:
    history = story.summary.extra["history"]
    assert sum(row["tasks"] for row in history) == STEPS * TASKS
    spans = read_folder(story.folder / "spans")
    rewards = spans.filter((pc.field("kind") == "reward") & (pc.field("name") == "reward"))
    assert set(Counter(rewards["attempt_id"].to_pylist()).values()) == {1}


def test_training_went_on_from_the_versions_that_were_there(story: Story) -> None:
    store = default_uri(story.folder.parent)
    versions = PolicyRegistry(store, "policy", story.summary.mlflow_run_id).versions()
    numbers = [version.number for version in versions]
    assert numbers == sorted(set(numbers))
    assert all(version.parent is None or version.parent in numbers for version in versions)
    assert numbers[-1] == story.summary.extra["version"]
    calls = read_folder(story.folder / "spans").filter(pc.field("kind") == "model_call")
    assert max(calls["version"].to_pylist()) <= numbers[-1]
