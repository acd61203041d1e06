"""Which versions an evaluation of a run that trained several policies asks."""

import pytest

from lightning_ray.errors import UserError
from lightning_ray.jobs.evaluate_choice import versions_of_run
from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.policies.registry import Weights
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import RunFolder

RUN = "2" * 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with versions 0 to 2 of the planner and 0 to 1 of the solver."""
    root = tmp_path_factory.mktemp("outputs")
    folder = RunFolder.create(root, "run", ["experiment=planner_and_solver"])
    folder.write_facts({"mlflow_run_id": RUN})
    for policy, last in (("planner", 2), ("solver", 1)):
        registry = PolicyRegistry(default_uri(root), policy, RUN)
        for number in range(last + 1):
            path = folder.version(policy, number)
            path.mkdir(parents=True)
            for name in (
                "tokenizer.json",
                "tokenizer_config.json",
                "config.json",
                "model.safetensors",
            ):
                (path / name).write_text("{}")
            registry.register(PolicyVersion(policy, number, path, RUN, None, number))
    return folder


def asked(run: RunFolder, **words: str) -> tuple[str, int, dict[str, int]]:
    """The policy and the version that are asked about, and the others beside it."""
    named = {"run": run.run_id, **words}
    config, subject, _ = versions_of_run(named, [f"output_dir={run.path.parent}"])
    others = {name: number for name, (_, number) in subject.others.items()}
    return config.policy.name, subject.number, others


def test_without_a_word_it_is_the_first_beside_the_newest_of_the_rest(run: RunFolder) -> None:
    assert asked(run) == ("planner", 2, {"solver": 1})
    assert asked(run, of="solver", version="0") == ("solver", 0, {"planner": 2})


def test_a_label_says_whose_version_it_is(run: RunFolder) -> None:
    words = {"run": run.run_id, "of": "solver", "against": "0"}
    _, subject, against = versions_of_run(words, [f"output_dir={run.path.parent}"])
    assert against is not None and against.others == subject.others
    assert subject.label == f"{run.run_id} solver version 1"
    assert against.label == f"{run.run_id} solver version 0"


def test_a_policy_without_any_weights_left_cannot_answer(run: RunFolder) -> None:
    registry = PolicyRegistry(default_uri(run.path.parent), "solver", RUN)
    for number in (0, 1):
        registry.mark_weights(number, Weights.REMOVED)
    with pytest.raises(UserError, match="none of the versions of solver has weights any more"):
        asked(run)
