"""An asynchronous run on the real stack, whose parts are killed while it trains."""

import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.compute as pc
import pytest

from lightning_ray.policies import PolicyRegistry
from lightning_ray.spans import read_folder
from lightning_ray.tracking import RunSummary, read_summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS, TASKS, GROUP, STALENESS = 5, 4, 4, 2
KILLED = {
    "step 1/": "ray::RolloutWorker",
    "step 2/": "ray::LearnerWorker",
    "step 3/": "ray::InferenceEngine",
}
"""What is killed, at a random moment of the next step, by the line that is then seen."""


@dataclass
class Story:
    """What was seen of the run."""

    folder: Path
    output: str
    killed: list[str]
    summary: RunSummary


@pytest.fixture(scope="module")
def story(cli, tmp_path_factory) -> Story:
    """Trains with tools that keep the agents waiting; kills a worker, the learner, the engine."""
    output = tmp_path_factory.mktemp("outputs")
    agent = ROOT / "benchmarks/agents/slow_calculator.py"
    process = cli.start(
        "train",
        "experiment=calculator",
        f"output_dir={output}",
        f'agent.command=[python,{agent},"{{question}}","3","1"]',
        f"training.staleness={STALENESS}",
        f"training.steps={STEPS}",
        f"training.tasks_per_step={TASKS}",
        f"algorithm.group_size={GROUP}",
        "training.checkpoint_every=1",
        "evaluation.tasks=null",
    )
    chance = random.Random(5)
    waiting = dict(KILLED)
    lines, killed = [], []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        for seen in [seen for seen in waiting if line.startswith(seen)]:
            name = waiting.pop(seen)
            time.sleep(chance.uniform(0, 4))
            family = psutil.Process(process.pid).children(recursive=True)
            for one in family:
                if one.name().startswith(name[:15]) and " ".join(one.cmdline()).startswith(name):
                    one.send_signal(signal.SIGKILL)
                    killed.append(name)
    assert process.wait(timeout=60) == 0, "".join(lines)
    (folder,) = [path for path in output.iterdir() if (path / "overrides.json").is_file()]
    return Story(folder, "".join(lines), killed, read_summary(folder / "summary.json"))


def test_the_run_goes_on_to_its_end(story):
    print(story.output)
    assert Counter(story.killed) == Counter(KILLED.values())
    assert "1 rollout workers died and were replaced" in story.output
    assert "1 engines of policy died and are being replaced" in story.output
    assert re.search(r"learner actor was lost.*going on from step \d", story.output)
    history = story.summary.extra["history"]
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    # No task is trained on twice, and none is left out.
    assert sum(row["tasks"] for row in history) == STEPS * TASKS
    assert all(row["reward"] >= 0 and row["groups_used"] + row["groups_flat"] for row in history)


def test_tokens_are_as_old_as_was_said_and_no_older(story):
    history = story.summary.extra["history"]
    assert max(row["staleness"] for row in history) >= 1, "nothing was asynchronous"
    assert max(row["staleness"] for row in history) <= STALENESS


def test_versions_go_on_and_each_has_its_parent(story):
    store = f"sqlite:///{story.folder.parent}/mlflow.db"
    versions = PolicyRegistry(store, "policy", story.summary.mlflow_run_id).versions()
    numbers = [version.number for version in versions]
    assert numbers == sorted(set(numbers)) and len(numbers) >= STEPS + 1
    assert all(version.parent is None or version.parent in numbers for version in versions)
    assert numbers[-1] == story.summary.extra["version"]


def test_no_rollout_ended_twice(story):
    """An attempt has its reward once; a second attempt of a rollout may have one where the first
    died after its reward and before its report."""
    spans = read_folder(story.folder / "spans")
    rewards = spans.filter((pc.field("kind") == "reward") & (pc.field("name") == "reward"))
    by_attempt = Counter(rewards["attempt_id"].to_pylist())
    assert set(by_attempt.values()) == {1}
    assert max(Counter(rewards["rollout_id"].to_pylist()).values()) <= 2
