"""Prompt versions in MLflow's registry, on sqlite."""

from pathlib import Path

import pytest

from lightning_ray.errors import UserError
from lightning_ray.policies import PromptVersion
from lightning_ray.policies.prompt_registry import CANDIDATE, PromptRegistry, prompt_name
from lightning_ray.tracking.store import open_client

OWN = PromptVersion("planner", 0, "Be brief.", "Be brief.")
BEST = PromptVersion(
    "planner", 7, "Be brief.", "Say {{x}} in ünïcode.\n", (("q?", "a!"), ("b", "c"))
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def run_id(uri) -> str:
    return open_client(uri).create_run("0").info.run_id


def test_a_version_is_read_as_it_was_registered(uri, run_id, monkeypatch, tmp_path):
    # Nothing may be written to a store that MLflow makes up in the working directory.
    monkeypatch.chdir(tmp_path)
    registry = PromptRegistry(uri, "round-trip")
    registry.register(OWN, run_id, {"proposer": "agent", "score": 0.25})
    entry = registry.register(BEST, run_id, {"proposer": "demonstrations", "parent": 0})
    registry.set_alias(entry)
    again = PromptRegistry(uri, "round-trip").load(f"prompts:/round-trip@{CANDIDATE}")
    assert again.prompt == BEST and again.uri == entry.uri == "prompts:/round-trip/2"
    assert again.aliases == (CANDIDATE,)
    assert again.tags["run"] == run_id and again.tags["parent"] == "0"
    assert [e.prompt for e in registry.entries()] == [OWN, BEST]
    own = registry.entries()[0]
    assert own.tags["score"] == "0.25" and "parent" not in own.tags
    assert list(Path(tmp_path).iterdir()) == []


def test_a_version_is_never_overwritten_and_runs_are_apart(uri, run_id):
    registry = PromptRegistry(uri, "apart")
    first = registry.register(OWN, run_id, {})
    other = PromptVersion("planner", 0, "Be brief.", "something else")
    assert registry.register(other, run_id, {}).prompt == OWN
    second = open_client(uri).create_run("0").info.run_id
    assert registry.register(other, second, {}).prompt == other
    assert [e.uri for e in registry.entries(run_id)] == [first.uri]
    assert len(registry.entries()) == 2


def test_an_alias_moves(uri, run_id):
    registry = PromptRegistry(uri, "moving")
    for prompt in (OWN, BEST):
        registry.set_alias(registry.register(prompt, run_id, {}), "champion")
    assert registry.load("prompts:/moving@champion").prompt == BEST
    assert registry.load("prompts:/moving/1").aliases == ()


def test_what_became_known_later_is_added(uri, run_id):
    registry = PromptRegistry(uri, "later")
    entry = registry.register(OWN, run_id, {})
    registry.tag(entry, {"heldout": 0.5})
    assert registry.load(entry.uri).tags["heldout"] == "0.5"


def test_mlflow_shows_the_versions_with_their_run(uri, run_id):
    PromptRegistry(uri, "linked").register(OWN, run_id, {})
    linked = open_client(uri).get_run(run_id).data.tags["mlflow.linkedPrompts"]
    assert linked == '[{"name": "linked", "version": "1"}]'


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("prompts:/missing/1", "not found"),
        ("prompts:/there@nobody", "nobody"),
        ("prompts:/there/99", "not found"),
        ("prompts:/foreign/1", "was not made by optimize-prompt"),
        ("there", "prompts:/NAME/N"),
    ],
)
def test_a_prompt_that_is_not_there_is_one_line(uri, run_id, choice, reason):
    registry = PromptRegistry(uri, "there")
    registry.register(OWN, run_id, {})
    if "foreign" in choice:
        open_client(uri).register_prompt("foreign", "a text")
    with pytest.raises(UserError, match=reason) as raised:
        registry.load(choice)
    assert len(str(raised.value).splitlines()) == 1


def test_a_name_that_weights_have_is_refused(uri):
    open_client(uri).create_registered_model("weights")
    with pytest.raises(UserError, match="a registered model has that name"):
        PromptRegistry(uri, "weights")


def test_a_prompt_is_named_after_its_policy():
    assert prompt_name("planner", None) == "planner-prompt"
    with pytest.raises(UserError, match=r"prompt\.name"):
        prompt_name("planner", "a/b")
