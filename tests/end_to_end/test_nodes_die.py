"""A run over several Ray nodes, of which any may be lost, and so may every other part."""

import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pytest

from benchmarks.nodes import Nodes
from lightning_ray.policies import PolicyRegistry
from lightning_ray.spans import read_folder
from lightning_ray.tracking import RunSummary, read_summary
from lightning_ray.tracking.store import default_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
STEPS, TASKS, GROUP = 9, 4, 4
LOST = {
    "step 1/": ("node", "rollouts"),
    "step 2/": ("process", "ray::RolloutQueue"),
    "step 3/": ("node", "inference"),
    "step 4/": ("process", "ray::_Shard"),
    "step 5/": ("process", "ray::ServeReplica"),
    "step 6/": ("node", "learner"),
    "step 7/": ("process", "ray::BatchMaker"),
    "step 8/": ("process", "VLLM::EngineCore"),
}
"""What is lost, at a random moment of the next step, by the line that is then seen."""


@dataclass
class Story:
    """What was seen of the run."""

    folder: Path
    output: str
    lost: list[tuple[str, str]]
    summary: RunSummary
    longest_s: float
    """Between two lines of the run, after the first step."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes.start()
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def story(
    nodes: Nodes, cli, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Story:
    """Trains asynchronously while one part after the other is lost."""
    output = tmp_path_factory.mktemp("outputs")
    agent = ROOT / "benchmarks/agents/slow_calculator.py"
    process = cli.start(
        "train",
        "experiment=calculator",
        *nodes.settings,
        f"output_dir={output}",
        f'agent.command=[python,{agent},"{{question}}","3","1"]',
        "training.staleness=2",
        f"training.steps={STEPS}",
        f"training.tasks_per_step={TASKS}",
        f"algorithm.group_size={GROUP}",
        "training.checkpoint_every=1",
        "evaluation.tasks=null",
    )
    chance = random.Random(11)
    waiting, lost, lines = dict(LOST), [], []
    longest, last = 0.0, None
    assert process.stdout is not None
    request.addfinalizer(process.kill)
    for line in process.stdout:
        now = time.monotonic()
        longest = max(longest, now - last if last is not None else 0.0)
        lines.append(line)
        last = now if last is not None or line.startswith("step 1/") else None
        for seen in [seen for seen in waiting if line.startswith(seen)]:
            how, what = waiting.pop(seen)
            time.sleep(chance.uniform(0, 3))
            if how == "node":
                nodes.lose(what)
                nodes.join(what)
            else:
                assert nodes.kill(what), f"there is no {what}"
            lost.append((how, what))
    assert process.wait(timeout=60) == 0, "".join(lines)
    (folder,) = [path for path in output.iterdir() if (path / "overrides.json").is_file()]
    summary = read_summary(folder / "summary.json")
    return Story(folder, "".join(lines), lost, summary, longest)


def test_the_run_goes_on_to_its_end_whatever_is_lost(story: Story) -> None:
    print(story.output)
    print(f"at most {story.longest_s:.0f} s between two lines")
    assert story.lost == list(LOST.values())
    assert "1 rollout workers died and were replaced" in story.output
    assert "1 engines of policy died and are being replaced" in story.output
    assert re.search(r"learner actor was lost.*going on from step \d", story.output)
    history = story.summary.extra["history"]
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))


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
