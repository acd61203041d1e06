"""Several unmodified agents on the real stack, each with something else that a trainer would meet.

One engine answers them all, one after the other.
"""

import json
import os
import re
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_ray.agents import AgentConfig, Task, check_agent, load_tasks
from lightning_ray.doctor import Doctor, DoctorConfig, Finding, Level, Report
from lightning_ray.doctor.ungraded import SPEC as UNGRADED
from lightning_ray.jobs.compose import compose_config
from lightning_ray.tracking import Progress
from lightning_ray.training import TrainConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# Asks twice, keeping its history, greedily, under a name that nobody listed; leaves a process.
GREEDY = """
    import json, os, subprocess, urllib.request
    subprocess.Popen(["sleep", "120"], start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    messages = [{"role": "system", "content": "You are brief."}]
    for question in ("Name a colour.", "And another."):
        messages.append({"role": "user", "content": question})
        body = {"model": "in-house-7b", "messages": messages, "temperature": 0, "max_tokens": 30,
                "stop": ["."]}
        request = urllib.request.Request(
            os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
            {"content-type": "application/json"})
        reply = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": reply})
    print(reply)
"""

ELSEWHERE = """
    import urllib.error, urllib.request
    try:
        urllib.request.urlopen("http://api.models.invalid/v1/chat/completions", b"{}", timeout=5)
    except (urllib.error.URLError, OSError):
        print("the model is down, sorry")
"""

CRASHING = """
    import os
    print(os.environ["TEAM_TOKEN"])
"""

TOOLS = """
    import json, os, sys, urllib.error, urllib.request
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "1 + 1?"}],
            "tools": [tool], "max_tokens": 10}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
        {"content-type": "application/json"})
    try:
        urllib.request.urlopen(request).read()
    except urllib.error.HTTPError as error:
        sys.exit(f"the model said {error.code}")
"""

# Not Python, and Anthropic's protocol, streamed.
SHELL = """
    curl -sN "$ANTHROPIC_BASE_URL/v1/messages" -H 'content-type: application/json' -d '{
      "model": "claude-haiku", "stream": true, "max_tokens": 8, "system": "You are terse.",
      "messages": [{"role": "user", "content": "Tell me about the sea."}]}' | tail -c 200
"""

Examine = Callable[..., Report]


@pytest.fixture(scope="module")
def examine(
    ray_cluster: None, real_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Examine]:
    folder = tmp_path_factory.mktemp("agents")
    config: DoctorConfig = compose_config("doctor", DoctorConfig, ["tracking.panel=plain"])

    def run(*command: str, script: str = "", tasks: tuple[Task, ...] = (), **more: str) -> Report:
        if script:
            (folder / command[-1]).write_text(textwrap.dedent(script))
            more["cwd"] = str(folder)
        agent = AgentConfig(
            **{"name": "tried", "command": list(command), "grader": UNGRADED} | more
        )
        check_agent(agent, tasks)
        report = doctor.examine(agent, tasks or (Task("task", {}),))
        print(report.text())
        return report

    with Doctor(config, real_model, Progress(1, mode="plain")) as doctor:
        yield run


def finding(report: Report, title: str, level: Level | None = None) -> Finding:
    (found,) = [f for f in report.findings if f.title == title and level in (None, f.level)]
    return found


def test_the_calculator_can_be_trained_and_the_experiment_that_does_it_is_valid(
    examine: Examine, tmp_path: Path
) -> None:
    report = examine(
        *("python", str(ROOT / "examples/calculator/agent.py"), "{question}"),
        tasks=tuple(load_tasks(ROOT / "examples/calculator/heldout.jsonl")[:3]),
        grader=str(ROOT / "examples/calculator/grader.py") + ":grade",
    )
    assert report.trainable and report.verdict.startswith("a trainer can learn"), report.text()
    assert "6 of 6 runs exit 0" in finding(report, "starts and ends").found
    assert finding(report, "base URL").found == "used: 6 requests in 6 runs"
    assert finding(report, "protocol").found == "/v1/chat/completions (6)"
    assert finding(report, "model names").found == "'gateway.models=[gpt-4o-mini]'"
    assert "Turn each question into a" in finding(report, "system prompts").found
    assert finding(report, "tokens").found.startswith("exact: 6 calls with ids, logprobs")
    assert finding(report, "sampling").level is Level.OK
    # How many are forked depends on how long the first one takes to show its libraries.
    assert re.match(r"5 of 6 runs were forked|not possible: ", finding(report, "warm start").found)
    assert "processor time" in finding(report, "cost").found
    assert "rewards: heldout-0000: " in finding(report, "grader").found
    experiment = tmp_path / "experiment/mine.yaml"
    experiment.parent.mkdir()
    experiment.write_text(report.experiment)
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    trained = compose_config("train", TrainConfig, overrides)
    assert trained.agent.command[2] == "{question}" and trained.gateway.models == ["gpt-4o-mini"]


def test_a_greedy_agent_is_told_why_it_cannot_be_trained(examine: Examine) -> None:
    report = examine("python", "greedy.py", script=GREEDY)
    assert not report.trainable and report.verdict == "not yet: sampling"
    assert "temperature 0" in finding(report, "sampling").found
    # Any name is answered, and named for the configuration.
    assert finding(report, "model names").found == "'gateway.models=[in-house-7b]'"
    assert "of 2 later calls continue" in finding(report, "turns").found
    left = finding(report, "processes")
    pids = [int(pid) for pid in re.findall(r"sleep \(pid (\d+)\)", left.found)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert left.level is Level.WARNING and len(pids) == 2


def test_an_agent_that_calls_somebody_else_is_told_whom(examine: Examine) -> None:
    report = examine("python", "elsewhere.py", script=ELSEWHERE)
    base = finding(report, "base URL")
    assert not report.trainable and base.level is Level.MISSING
    assert "OPENAI_BASE_URL" in base.found and "tried to reach api.models.invalid" in base.found
    assert finding(report, "starts and ends").level is Level.OK


def test_an_agent_that_misses_a_variable_is_told_how_to_give_it(examine: Examine) -> None:
    report = examine("python", "crashing.py", script=CRASHING)
    ends = finding(report, "starts and ends")
    assert ends.level is Level.MISSING and "KeyError: 'TEAM_TOKEN'" in ends.found
    assert "+agent.env.TEAM_TOKEN=VALUE" in finding(report, "environment").change


def test_tools_without_a_parser_are_a_refusal_with_the_setting_that_is_lacking(
    examine: Examine,
) -> None:
    report = examine("python", "tools.py", script=TOOLS)
    refused = finding(report, "refusals")
    assert refused.level is Level.MISSING and "400" in refused.found
    assert "inference.tool_call_parser" in refused.change
    assert "no place for tools" in finding(report, "tools").found


def test_a_shell_script_that_speaks_another_protocol_streamed(examine: Examine) -> None:
    report = examine("sh", "agent.sh", script=SHELL)
    assert report.trainable, report.text()
    assert finding(report, "protocol").found == "/v1/messages (2, streamed)"
    assert finding(report, "system prompts").found == "one:\n'You are terse.'"
    assert finding(report, "tokens").found.startswith("exact: 2 calls")
    assert "started as the command it is" in finding(report, "warm start").found
    assert json.dumps(report.as_json())


@pytest.mark.slow
def test_the_command_says_it_with_its_status_and_in_a_file(cli, tmp_path: Path) -> None:
    script = tmp_path / "crashing.py"
    script.write_text(textwrap.dedent(CRASHING))
    found = tmp_path / "report.json"
    done = cli.run("doctor", "--json", str(found), "--", "python", str(script))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "verdict: not yet: starts and ends, environment, base URL" in done.stdout
    report = json.loads(found.read_text())
    assert report["trainable"] is False and report["runs"] == 2
