"""Two roles learn at once on the real stack; one of the two learners is killed on the way."""

import random
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
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import RunFolder
from lightning_ray.training.checkpoints import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, TASKS, GROUP = 4, 4, 4
ROLES = ("planner", "solver")


@dataclass
class Story:
    """What was seen of the run."""

    folder: RunFolder
    output: str
    summary: RunSummary


def named(parent: int, name: str) -> list[psutil.Process]:
    """The processes below another one that are called so."""
    found = []
    for one in psutil.Process(parent).children(recursive=True):
        try:
            if " ".join(one.cmdline()).startswith(name):
                found.append(one)
        except psutil.NoSuchProcess:
            continue  # An agent that has just ended.
    return found


@pytest.fixture(scope="module")
def story(cli, tmp_path_factory) -> Story:
    """Trains both; once step 2 is done, one of the two learners dies."""
    output = tmp_path_factory.mktemp("outputs")
    process = cli.start(
        "train",
        "experiment=planner_and_solver",
        f"output_dir={output}",
        f"training.steps={STEPS}",
        f"training.tasks_per_step={TASKS}",
        f"algorithm.group_size={GROUP}",
        "training.checkpoint_every=1",
        # Of the default 3 the first would be gone.
        "policies.planner.keep_versions=9",
        "policies.solver.keep_versions=9",
        "evaluation.tasks=null",
    )
    chance = random.Random(7)
    lines, killed = [], False
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 2/") and not killed:
            killed = True
            time.sleep(chance.uniform(0, 4))
            # As many learners as roles, whoever of them it is.
            learners = named(process.pid, "ray::LearnerW")
            assert len(learners) == len(ROLES)
            chance.choice(learners).send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == 0, "".join(lines)
    (path,) = [path for path in output.iterdir() if (path / "overrides.json").is_file()]
    return Story(RunFolder(path), "".join(lines), read_summary(path / "summary.json"))


def test_each_policy_counts_its_own_versions_and_all_of_them_are_used(story: Story) -> None:
    print(story.output)
    versions = story.summary.extra["versions"]
    assert set(versions) == set(ROLES) and all(versions[role] >= 1 for role in ROLES)
    spans = read_folder(story.folder.spans)
    calls = spans.filter(pc.field("kind") == "model_call")
    for role in ROLES:
        mine = calls.filter(pc.field("policy") == role)
        assert set(mine["role"].to_pylist()) == {role}
        assert {0, 1} <= set(mine["version"].to_pylist()) <= set(range(versions[role] + 1))
        store = default_uri(story.folder.path.parent)
        registered = PolicyRegistry(store, role, story.summary.mlflow_run_id).versions()
        assert registered[-1].number == versions[role]
        assert registered[-1].path == story.folder.version(role, versions[role])


def test_the_weights_of_both_change_and_each_in_its_own_way(story: Story) -> None:
    written = [
        (story.folder.version(role, number) / "model.safetensors").read_bytes()
        for role in ROLES
        for number in (1, story.summary.extra["versions"][role])
    ]
    assert len(set(written)) == len(written)


def test_a_dead_learner_sends_both_back_to_one_moment(story: Story) -> None:
    assert "a learner actor was lost" in story.output and "going on from step" in story.output
    history = story.summary.extra["history"]
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    assert sum(row["tasks"] for row in history) == STEPS * TASKS
    for role in ROLES:
        assert all(row[f"{role}/sampled_tokens"] > 0 for row in history)
        assert history[-1][f"{role}/version"] == story.summary.extra["versions"][role]
    newest = story.folder.last_checkpoint()
    assert newest is not None
    state = Checkpoints.peek(newest)
    assert {name: one.version for name, one in state.policies.items()} == (
        story.summary.extra["versions"]
    )


def test_no_rollout_ended_twice(story: Story) -> None:
    spans = read_folder(story.folder.spans)
    rewards = spans.filter((pc.field("kind") == "reward") & (pc.field("name") == "reward"))
    assert set(Counter(rewards["attempt_id"].to_pylist()).values()) == {1}


def test_a_version_of_one_is_evaluated_beside_the_newest_of_the_other(
    story: Story, cli, tmp_path: Path
) -> None:
    tasks = tmp_path / "few.jsonl"
    heldout = Path(__file__).parents[2] / "examples/calculator/heldout.jsonl"
    tasks.write_text("\n".join(heldout.read_text().splitlines()[:4]) + "\n")
    root = story.folder.path.parent
    done = cli.run(
        "evaluate",
        f"run={story.folder.run_id}",
        "of=solver",
        "version=0",
        f"output_dir={root}",
        f"evaluation.tasks={tasks}",
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = root.glob("*-evaluate-*")
    calls = read_folder(folder / "spans").filter(pc.field("kind") == "model_call")
    seen = set(zip(calls["policy"].to_pylist(), calls["version"].to_pylist(), strict=True))
    # The solver is not asked where no plan can be run.
    assert ("planner", story.summary.extra["versions"]["planner"]) in seen
    assert seen <= {("planner", story.summary.extra["versions"]["planner"]), ("solver", 0)}
