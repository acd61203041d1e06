"""The report, and the experiment that it proposes."""

import json
from dataclasses import asdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_ray.agents import AgentConfig
from lightning_ray.doctor.experiment import experiment_yaml, train_command
from lightning_ray.doctor.finding import Finding, Level, Report, missing, ok, warning
from lightning_ray.jobs.compose import compose_config
from lightning_ray.training import TrainConfig

# Hydra reads `${`; what was typed is not for it to read.
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20) | st.text(
    "${}\\a:", min_size=1, max_size=8
)


def report(*findings: Finding) -> Report:
    return Report(["python", "a.py"], 2, findings, "name: agent\n", "lightning-ray train")


def test_the_verdict_follows_the_worst_finding() -> None:
    good, bad = ok("a", "fine"), missing("tokens", "none", "call a model")
    assert report(good).verdict == "a trainer can learn from this agent"
    warned = report(good, warning("b", "so so", "do"))
    assert warned.trainable and warned.verdict.endswith("(1 warning)")
    assert not report(good, bad).trainable and report(good, bad).verdict == "not yet: tokens"


def test_the_text_shows_everything_and_the_experiment_only_when_it_would_work() -> None:
    shown = report(warning("sampling", "temperature 0.7\nin all", "use 1"), ok("b", "fine")).text()
    assert "warning  sampling             temperature 0.7\n" in shown
    assert " in all\n" in shown and " change: use 1\n" in shown
    assert "verdict: a trainer can learn from this agent (1 warning)" in shown
    assert "    name: agent" in shown
    assert "name: agent" not in report(missing("b", "nothing", "mend")).text()
    assert all(len(line) <= 100 for line in report(ok("b", "word " * 90)).text().splitlines())


def test_json_holds_the_same() -> None:
    found = report(missing("b", "nothing", "mend"))
    plain = json.loads(json.dumps(found.as_json()))
    assert plain["trainable"] is False and plain["verdict"] == found.verdict
    assert plain["findings"] == [asdict(finding) for finding in found.findings]
    assert plain["findings"][0]["level"] == "missing"


def test_a_finding_that_is_not_ok_says_what_to_change() -> None:
    with pytest.raises(ValueError, match="does not say what to change"):
        Finding(Level.WARNING, "a", "bad")


@settings(max_examples=10)
@example(
    ["python", "0E0", "1e5", ".5e3", "0o17", "0X1F", "1_000", "y"], ["0E0", "12e-3", "2026-11-26"]
)
@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS, min_size=1, max_size=3))
def test_the_experiment_that_is_proposed_is_the_agent_that_was_examined(
    tmp_path_factory: pytest.TempPathFactory, command: list[str], models: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("conf")
    agent = AgentConfig(
        name="mine", command=command, grader="", env={"A": "1"}, timeout_s=7.0, warm_start=False
    )
    (folder / "experiment").mkdir()
    text = experiment_yaml(agent, models, "tasks.jsonl", "g.py:grade")
    (folder / "experiment/mine.yaml").write_text(text, encoding="utf-8")
    found = compose_config(
        "train", TrainConfig, [f"hydra.searchpath=[file://{folder}]", "experiment=mine"]
    )
    assert found.agent.command == command and found.gateway.models == models
    assert (found.agent.env, found.agent.timeout_s) == ({"A": "1"}, 7.0)
    assert found.agent.warm_start is False and found.agent.grader == "g.py:grade"
    assert found.training.tasks == "tasks.jsonl" and found.name == "mine"


def test_what_is_not_known_yet_has_a_placeholder() -> None:
    text = experiment_yaml(AgentConfig(name="a", command=["x"], grader=""), ["m"], None, None)
    assert "# my_grader.py:grade: the function" in text and "grader: my_grader.py:grade" in text
    assert "tasks: my_tasks.jsonl" in text


def test_settings_of_the_engine_go_with_the_command_and_those_of_the_check_do_not() -> None:
    typed = ["tasks=t.jsonl", "count=2", "+agent.env.A=1", "inference.extra={a: 1}", "json=x"]
    command = train_command(typed)
    assert command.endswith("experiment=mine 'inference.extra={a: 1}'")
    assert "count" not in command and "json" not in command and "agent" not in command
