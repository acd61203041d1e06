"""Prompt optimisation where the agent's model is somebody's API: the whole job, and what it leaves.

The API is a fake of somebody else's server; Ray, the gateway, the agent and MLflow are real.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fake_api import INSTRUCTION, FakeApi, fake_api
from mlflow import MlflowClient

from lightning_ray.policies.prompt_registry import PromptRegistry
from lightning_ray.spans import SpanKind
from lightning_ray.spans.query import read_folder

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

OWN = "Turn each question into a calculator expression."
HEAVY = ("libtorch", "/vllm/", "/deepspeed/")
SECRETS = ("sk-of-the-model", "sk-of-the-reflector")
BUDGET = 44


@dataclass
class Story:
    """What was seen of the run."""

    folder: Path
    uri: str
    output: str
    status: int
    loaded: set[str]
    """Heavy libraries that some process had mapped, by the process's name."""
    api: FakeApi


@pytest.fixture(scope="module")
def story(cli, few_heldout, tmp_path_factory) -> Iterator[Story]:
    output = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch, fake_api() as api:
        patch.setenv("MODEL_KEY", SECRETS[0])
        patch.setenv("REFLECTOR_KEY", SECRETS[1])
        process = cli.start(
            "optimize-prompt",
            "experiment=calculator",
            f"output_dir={output}",
            f"evaluation.tasks={few_heldout}",
            f"policy.upstream.base_url={api.url}",
            "policy.upstream.model=big",
            "policy.upstream.api_key_env=MODEL_KEY",
            "policy.upstream.output_per_million=1",
            "prompt=reflection",
            f"prompt.reflection.base_url={api.url}",
            "prompt.reflection.model=reflector",
            "prompt.reflection.api_key_env=REFLECTOR_KEY",
            "prompt.validation=8",
            "prompt.minibatch=4",
            "prompt.proposals=2",
            f"prompt.max_rollouts={BUDGET}",
        )
        loaded = watch(process.pid)
        lines, _ = process.communicate(timeout=60)
    (folder,) = (path for path in output.iterdir() if path.name.startswith("calculator-prompt-"))
    uri = f"sqlite:///{output}/mlflow.db"
    yield Story(folder, uri, lines, process.returncode, loaded, api)


def watch(pid: int, limit_s: float = 480) -> set[str]:
    """Heavy libraries in the job's process and every process that it starts, until it ends."""
    loaded: set[str] = set()
    root = psutil.Process(pid)
    end = time.monotonic() + limit_s
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        for process in [root, *root.children(recursive=True)]:
            try:
                paths = [region.path for region in process.memory_maps()]
                name = process.name()
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            loaded |= {f"{name}: {p}" for p in paths if any(heavy in p for heavy in HEAVY)}
            if any(actor in name for actor in ("InferenceEngine", "LearnerWorker")):
                loaded.add(name)
        time.sleep(0.5)
    return loaded


def summary(story: Story) -> dict:
    return json.loads((story.folder / "summary.json").read_text())


def test_the_proposed_prompt_wins_on_held_out_tasks(story):
    assert story.status == 0, story.output
    found = summary(story)
    assert found["heldout_before"] == 0.0 and found["heldout_after"] == 1.0
    assert found["better"] and found["heldout_difference"]["low"] > 0
    assert found["rollouts"] <= BUDGET
    assert "held-out score 0.000 before, 1.000 after" in story.output
    assert INSTRUCTION in (story.folder / "best_prompt.txt").read_text()


def test_no_torch_vllm_or_deepspeed_was_started(story):
    assert story.status == 0 and story.loaded == set()


def test_the_versions_are_in_the_registry_with_their_lineage(story):
    registry = PromptRegistry(story.uri, "policy-prompt")
    best = registry.load("prompts:/policy-prompt@candidate")
    assert (best.prompt.seed, best.prompt.text) == (OWN, INSTRUCTION)
    assert best.tags["proposer"] == "reflection" and best.tags["parent"] == "0"
    assert float(best.tags["score"]) == 1.0 and float(best.tags["heldout_difference"]) == 1.0
    own = registry.entries()[0]
    assert own.prompt.version == 0 and own.prompt.text == OWN and own.tags["heldout"] == "0.0"
    assert best.tags["run"] == own.tags["run"] == summary(story)["mlflow_run_id"]


def test_the_run_is_tracked_with_its_figures_and_pictures(story):
    client = MlflowClient(story.uri)
    run = client.get_run(summary(story)["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["lightning_ray.job"] == "optimize-prompt"
    assert run.data.params["prompt.proposer"] == "reflection"
    assert run.data.metrics["heldout_after"] == 1.0
    # 10 tokens an answer, at a dollar a million.
    rollouts = 4 + 16 + summary(story)["rollouts"] + 16
    assert run.data.metrics["cost_usd"] == pytest.approx(rollouts * 10 / 1e6)
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {
        "prompt_search.png",
        "best_prompt.txt",
        "candidates.jsonl",
        "summary.json",
        "config.yaml",
    } <= names


def test_the_reflector_saw_what_happened_on_training_tasks_alone(story, few_heldout):
    asked = [body["messages"][0]["content"] for body in story.api.asked("reflector")]
    assert asked and OWN in asked[0] and "That is an interesting question." in asked[0]
    assert "Scores given by the grader: reward 0" in asked[0]
    heldout = [json.loads(line)["question"] for line in few_heldout.read_text().splitlines()]
    assert not any(question in prompt for question in heldout for prompt in asked)


def test_each_call_names_the_version_that_was_in_its_place(story):
    spans = read_folder(story.folder / "spans").to_pylist()
    calls = [row for row in spans if row["kind"] == SpanKind.MODEL_CALL.value]
    for row in calls:
        told = json.loads(row["attributes"])
        system = told["request"]["messages"][0]["content"]
        assert system == (INSTRUCTION if "prompt" in told else OWN)
    labels = {json.loads(row["attributes"]).get("prompt") for row in calls}
    assert labels == {None, "policy@1"}


def test_keys_went_to_their_endpoints_and_nowhere_else(story):
    keys = {body["model"]: headers["authorization"] for headers, body in story.api.requests}
    assert keys == {"big": f"Bearer {SECRETS[0]}", "reflector": f"Bearer {SECRETS[1]}"}
    for root, _, files in os.walk(story.folder.parent):
        for name in files:
            content = (Path(root) / name).read_bytes()
            assert not any(secret.encode() in content for secret in SECRETS), name
    assert not any(secret in story.output for secret in SECRETS)
