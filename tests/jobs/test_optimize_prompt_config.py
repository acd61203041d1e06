"""What can be typed wrong for `optimize-prompt`, and whose prompt is optimised."""

import pytest

from lightning_ray.algorithms.prompt_config import Proposer
from lightning_ray.cli import run
from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.tracking.store import default_uri, open_client
from lightning_ray.training.prompt_job import (
    OptimizePromptConfig,
    check_optimize_prompt,
    split_tasks,
)

REFLECTION = ("prompt=reflection", "prompt.reflection.model=big")
ENDPOINT = "prompt.reflection.base_url=https://api.example.com/v1"
UPSTREAM = "upstream.base_url=https://api.example.com/v1"


def checked(*overrides: str) -> OptimizePromptConfig:
    words = ["experiment=calculator", *overrides]
    config = compose_config("optimize_prompt", OptimizePromptConfig, words)
    check_optimize_prompt(config)
    assert isinstance(config, OptimizePromptConfig)
    return config


def test_an_experiment_made_for_training_serves():
    config = checked()
    assert config.prompt.proposer is Proposer.demonstrations
    assert not config.policy.train and list(config.policies) == ["policy"]


def test_a_policy_behind_an_api_needs_no_word_on_training():
    assert checked(f"policy.{UPSTREAM}").policy.is_upstream


@pytest.mark.parametrize(
    ("words", "policy"),
    [((), "planner"), (("prompt.policy=solver",), "solver")],
)
def test_of_several_policies_it_is_the_trained_one_or_the_one_named(words, policy):
    config = checked("experiment=planner", *words)
    assert config.policy.name == policy and set(config.policies) == {"planner", "solver"}
    assert not any(other.train for other in config.policies.values())
    assert config.gateway.roles["planner"].policy == "planner"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("prompt=reflection",), "prompt.reflection.base_url=null"),
        (("prompt=reflection", ENDPOINT), "prompt.reflection.model"),
        ((*REFLECTION, "prompt.reflection.base_url=api.example.com"), "http(s)://HOST/v1"),
        ((*REFLECTION, ENDPOINT, "prompt.reflection.timeout_s=0"), "timeout_s=0"),
        (("prompt.max_rollouts=20",), "prompt.max_rollouts=20: one round takes"),
        (("prompt.minibatch=0",), "prompt.minibatch=0"),
        (("prompt.validation=0",), "prompt.validation=0"),
        (("prompt.demonstrations.max=0",), "prompt.demonstrations.max=0"),
        (("prompt.demonstrations.top_share=2",), "prompt.demonstrations.top_share=2"),
        (("prompt.min_usable=-1",), "prompt.min_usable=-1"),
        (("prompt.name=a/b",), "prompt.name='a/b'"),
        (("prompt.seed=' '",), "prompt.seed is empty"),
        (("prompt.policy=nobody",), "the policies are: policy"),
        (
            ("experiment=planner", "policies.planner.train=false"),
            "prompt.policy: name one; the policies are: planner, solver",
        ),
        (("prompt.proposer=guess",), "prompt.proposer"),
        (("policy.upstream.base_url=api",), "no http(s) URL"),
        (("training.steps=0",), "training.steps=0"),
    ],
)
def test_a_mistake_is_one_line(words, named):
    with pytest.raises(UserError) as raised:
        checked(*words)
    assert named in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_tasks_are_split_in_two_and_one_is_too_few():
    assert [split_tasks(n, 32) for n in (2, 10, 64, 1000)] == [1, 5, 32, 32]
    with pytest.raises(UserError, match="at least 2"):
        split_tasks(1, 32)


def test_a_name_that_a_model_has_ends_the_command_before_a_run_is_made(tmp_path, capsys):
    open_client(default_uri(tmp_path)).create_registered_model("taken")
    words = [f"policy.{UPSTREAM}", "prompt.name=taken", f"output_dir={tmp_path}"]
    capsys.readouterr()  # what MLflow says while it makes its tables
    assert run(["optimize-prompt", "experiment=calculator", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: prompt.name=taken: a registered model has that name")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("prompt.reflection.api_key_env=NO_SUCH_KEY",), "NO_SUCH_KEY: that environment variable"),
        ((), "no language model answers there"),
        ((f"policy.{UPSTREAM}", "policy.upstream.api_key_env=NO_SUCH_KEY"), "NO_SUCH_KEY"),
    ],
)
def test_a_key_or_an_endpoint_that_is_not_there_ends_the_command(
    words, named, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    words = (*words, f"output_dir={tmp_path}", "policy.model=/nowhere")
    if "upstream" not in str(words):
        words = (*REFLECTION, "prompt.reflection.base_url=http://127.0.0.1:9/v1", *words)
    assert run(["optimize-prompt", "experiment=calculator", *words]) == 2
    out = capsys.readouterr()
    assert named in out.err and len(out.err.splitlines()) == 1 and out.out == ""
    assert list(tmp_path.iterdir()) == []
