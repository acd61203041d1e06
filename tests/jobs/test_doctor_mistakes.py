"""What can be got wrong at `lightning-ray doctor` is one line and status 2, with no Ray started."""

from pathlib import Path

import pytest
import ray

from lightning_ray.agents import AgentConfig
from lightning_ray.cli import run
from lightning_ray.doctor.ungraded import SPEC as UNGRADED
from lightning_ray.jobs.doctor import configure

AGENT = ["--", "python", "examples/calculator/agent.py", "{question}"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "write its command after --"),
        (["count=2"], "write its command after --"),
        (["--"], "no command after --"),
        (["--", "no-such-program"], "no executable 'no-such-program'"),
        (["--", "python", "no-such-script.py"], "no script"),
        (AGENT, "tasks=FILE"),
        (["tasks=no-such-file.jsonl", *AGENT], "no-such-file.jsonl: cannot read the task file"),
        (["tasks=examples/calculator/heldout.jsonl", "--", "sh", "{nothing}"], "field 'nothing'"),
        (["count=0", *AGENT], "count=0: must be at least 1"),
        (["samples=0", *AGENT], "samples=0: must be at least 1"),
        (["kount=2", *AGENT], "kount"),
        (["grader=nowhere.py:grade", "--", "true"], "no file"),
        (["--json"], "write its command after --"),
        (["--json", *AGENT], "--json: name the file"),
        (["--json", "/no/such/folder/report.json", *AGENT], "no such folder"),
        (["cluster.address=127.0.0.1:1", *AGENT], "use cluster.address=local"),
        (["policy.model=/no/such/model", "--", "true"], "policy.model"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    running = ray.is_initialized()
    assert run(["doctor", *words]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ") and reason in line and shown.out == ""
    assert ray.is_initialized() == running


def test_what_stands_after_the_dashes_is_the_agents_own(tmp_path: Path) -> None:
    words = ["count=1", "--json", f"{tmp_path}/r.json", "--", "prog", "--json", "a=b", "--", "-h"]
    config, typed = configure(words)
    assert config.agent.command == ["prog", "--json", "a=b", "--", "-h"]
    assert typed == ["count=1", f"json={tmp_path}/r.json"] and config.json == f"{tmp_path}/r.json"
    assert (config.agent.grader, config.count) == (UNGRADED, 1)


def test_the_agent_is_launched_as_a_training_job_would() -> None:
    config, _ = configure(["+agent.env.A=1", "agent.timeout_s=5", "--", "true"])
    default = AgentConfig()
    assert config.agent.inherit_env == default.inherit_env
    assert (config.agent.env, config.agent.timeout_s) == ({"A": "1"}, 5.0)
