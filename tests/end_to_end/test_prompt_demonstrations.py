"""Demonstrations on the real model: the held-out score of an unmodified agent rises, its weights
stay."""

import json

import pytest

from lightning_ray.policies.prompt_registry import PromptRegistry
from lightning_ray.spans import SpanKind
from lightning_ray.spans.query import read_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_demonstrations_from_the_best_spans_raise_the_held_out_score(cli, tmp_path, request):
    heldout = tmp_path / "heldout.jsonl"
    lines = (request.config.rootpath / "examples/calculator/heldout.jsonl").read_text()
    heldout.write_text("\n".join(lines.splitlines()[:48]) + "\n")
    output = tmp_path / "outputs"
    done = cli.run(
        "optimize-prompt",
        "experiment=calculator",
        f"output_dir={output}",
        f"evaluation.tasks={heldout}",
        "prompt.minibatch=8",
        "prompt.validation=24",
        "prompt.demonstrations.bootstrap=24",
        "prompt.max_rollouts=280",
        "prompt.target=0.75",
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (path for path in output.iterdir() if path.name.startswith("calculator-prompt-"))
    found = json.loads((folder / "summary.json").read_text())
    assert found["heldout_after"] > found["heldout_before"] + 0.15, done.stdout
    assert found["better"] and found["rollouts"] <= 280

    best = PromptRegistry(f"sqlite:///{output}/mlflow.db", "policy-prompt").load(found["prompt"])
    assert best.aliases == ("candidate",) and best.prompt.text == best.prompt.seed
    # Each was said by the model itself, in a rollout of a training task that came out right.
    spans = read_folder(folder / "spans").to_pylist()
    said = {
        (told["request"]["messages"][-1]["content"], told["reply"]["text"])
        for row in spans
        if row["kind"] == SpanKind.MESSAGE.value
        for told in [json.loads(row["attributes"])]
    }
    assert 1 <= len(best.prompt.demonstrations) <= 4
    assert set(best.prompt.demonstrations) <= said
    questions = {json.loads(line)["question"] for line in lines.splitlines()}
    assert not questions & {user for user, _ in best.prompt.demonstrations}
    # One engine answered throughout, at version 0.
    calls = [row for row in spans if row["kind"] == SpanKind.MODEL_CALL.value]
    assert {row["version"] for row in calls} == {0}
