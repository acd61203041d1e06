"""What can be wrong with `lightning-ray evaluate run=...` ends before Ray starts."""

import json
import shutil
from pathlib import Path

import pytest
import ray

from lightning_ray.errors import UserError
from lightning_ray.jobs import evaluate
from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.policies.registry import Weights
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import RunFolder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a run of versions 0 to 3, of which 1 was removed and 2 is smaller."""
    root = tmp_path_factory.mktemp("outputs")
    # The last two are of another job than training, and mean nothing here.
    typed = ["experiment=calculator", "where=reward >= 1", "finetuning.epochs=2"]
    folder = RunFolder.create(root, "run", typed)
    folder.write_facts({"mlflow_run_id": "1" * 32})
    registry = PolicyRegistry(default_uri(root), "policy", "1" * 32)
    for number in range(4):
        path = folder.version("policy", number)
        path.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            (path / name).write_text("{}")
        shape = {"model_type": "llama", "hidden_size": 32 if number == 2 else 64}
        (path / "config.json").write_text(json.dumps(shape))
        registry.register(PolicyVersion("policy", number, path, "1" * 32, None, number))
    registry.mark_weights(1, Weights.REMOVED)
    shutil.rmtree(folder.version("policy", 1))
    unbegun = RunFolder.create(root, "unbegun", ["experiment=calculator"])
    unbegun.path.rename(root / "unbegun")
    evaluation = RunFolder.create(root, "old-evaluate", [])
    evaluation.write_facts({"job": "evaluate"})
    evaluation.path.rename(root / "evaluation")
    folder.path.rename(root / "run")
    # The registry names the folders where they lay.
    for number in (0, 2, 3):
        moved = folder.version("policy", number)
        moved.parent.mkdir(parents=True, exist_ok=True)
        (root / "run/versions/policy" / str(number)).rename(moved)
    return root


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run=yesterday"], "run=yesterday: no such run in .*; the runs there are: run, unbegun"),
        (["run=evaluation"], "run=evaluation: an evaluation, which made no version"),
        (["run=unbegun"], "run=unbegun: it has no version"),
        (
            ["run=run", "version=9"],
            r"version=9: .* no such version; versions with weights: 0, 2, 3",
        ),
        (["run=run", "version=last"], "version=last: .* no such version"),
        (["run=run", "version=1"], "version=1: its weights were removed by retention"),
        (["run=run", "against=1"], "against=1: its weights were removed by retention"),
        (["run=run", "against=3"], "against=3: version 3 against itself"),
        (["run=run", "version=0", "against=2"], "hidden_size is 32 in .* version 2 and 64 in"),
        (["run=run", "evaluation.tasks=null"], "evaluation.tasks: no held-out tasks"),
        (["run=run", "evaluation.tasks=no.jsonl"], "no.jsonl: cannot read the task file"),
        (["run=run", "gate.max_regression=0.1"], "add against="),
        (["run=run", "gate.min_tool_discipline=7"], "between 0 and 1"),
        (["run=run", "of=solver"], "of=solver: the run trained policy"),
        (["experiment=calculator", "version=2"], "version=2: of which run"),
        (["experiment=calculator", "of=policy"], "of=policy: of which run"),
        (["experiment=calculator", "against=/nowhere"], "against=/nowhere: no such folder"),
        (["experiment=calculator", "against=embedded"], "against=embedded: the same model"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    outputs: Path, words: list[str], reason: str, ray_was: bool
) -> None:
    before = sorted(outputs.iterdir())
    with pytest.raises(UserError, match=reason) as raised:
        evaluate.main([*words, f"output_dir={outputs}"])
    assert "\n" not in str(raised.value)
    assert sorted(outputs.iterdir()) == before
    assert ray.is_initialized() is ray_was


@pytest.fixture
def ray_was() -> bool:
    """Whether an earlier test's Ray is up."""
    return ray.is_initialized()
