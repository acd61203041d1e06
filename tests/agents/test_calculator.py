"""The calculator example: an agent as its author wrote it, run against a model that is canned."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from agents_support import warmed, with_launcher

from lightning_ray.agents import (
    AgentConfig,
    AgentEnd,
    AgentResult,
    Task,
    WarmLauncher,
    attempt_environment,
    check_agent,
    grade,
    load_grader,
    load_tasks,
)
from lightning_ray.spans.schema import SPAN_SCHEMA

FOLDER = Path(__file__).parents[2] / "examples" / "calculator"
CONFIG = AgentConfig(
    name="calculator",
    command=["python", "agent.py", "{question}"],
    cwd=str(FOLDER),
    grader=f"{FOLDER}/grader.py:grade",
)


def test_the_agent_runs_the_models_call(model):
    replies = {
        "calc(345 + 27)": "calc(345 + 27) = 372\n",
        " calc(2*-3)\n": "calc(2 * -3) = -6\n",
        "calc(345 - 27) is it": "no tool call: calc(345 - 27) is it\n",
        "It is\n372.": "no tool call: It is 372.\n",
        "": "no tool call: \n",
    }

    async def use(launcher):
        assert isinstance(launcher, WarmLauncher)
        base = f"http://127.0.0.1:{model.server_address[1]}/capability"
        task = Task("1", {"question": "What is 345 plus 27?"})
        env = attempt_environment(base, "secret")
        model.says = "calc(1 + 1)"
        await warmed(launcher, task, env)
        results = []
        for model.says in replies:
            results.append(await launcher.run(task, env, 30))
        return results

    results = with_launcher(CONFIG, use)
    assert [(r.stdout, r.stderr) for r in results] == [(out, "") for out in replies.values()]
    assert all(r.warm for r in results)
    path, body, authorization = model.asked[-1]
    assert (path, authorization) == ("/capability/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "gpt-4o-mini",
        "max_tokens": 20,
        "messages": [
            {"role": "system", "content": "Turn each question into a calculator expression."},
            {"role": "user", "content": "What is 12 plus 30?"},
            {"role": "assistant", "content": "calc(12 + 30)"},
            {"role": "user", "content": "What is 345 plus 27?"},
        ],
    }


def test_the_agent_never_heard_of_us():
    source = (FOLDER / "agent.py").read_text()
    assert len(source.splitlines()) <= 60
    assert "lightning" not in source.lower()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert imported == {"openai", "operator", "re", "sys"}


def test_the_tasks_are_right_and_heldout_ones_are_in_no_training_step():
    files = {name: load_tasks(FOLDER / f"{name}.jsonl") for name in ("train", "heldout")}
    assert {name: len(tasks) for name, tasks in files.items()} == {"train": 1024, "heldout": 128}
    asked = {name: {t.data["question"] for t in tasks} for name, tasks in files.items()}
    assert not asked["train"] & asked["heldout"]
    assert len(asked["train"] | asked["heldout"]) == 1152
    assert "What is 12 plus 30?" not in asked["train"] | asked["heldout"]
    signs = {"plus": "+", "sum": "+", "minus": "-", "difference": "-", "times": "*", "product": "*"}
    calculations: dict[str, set[tuple[str, str, str]]] = {"train": set(), "heldout": set()}
    for name, tasks in files.items():
        for task in tasks:
            left, right = re.findall(r"\d+", task.data["question"])
            (sign,) = [signs[w] for w in re.findall(r"[a-z]+", task.data["question"]) if w in signs]
            assert 10 <= int(left) < 1000 and 10 <= int(right) < 1000
            assert task.data["answer"] == eval(f"{left} {sign} {right}")
            calculations[name].add((left, sign, right))
    # However a calculation is worded, one that is scored on is not trained on.
    assert not calculations["train"] & calculations["heldout"]
    check_agent(CONFIG, files["train"] + files["heldout"])


def test_the_committed_tasks_are_those_of_the_documented_command(tmp_path):
    shutil.copy(FOLDER / "tasks.py", tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "tasks.py")], check=True, timeout=30)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "reward", "exact", "well_formed"),
    [
        ("calc(12 + 30) = 42\n", 1.0, 1.0, 1.0),
        ("calc(12 + 31) = 43\n", 0.1, 0.0, 1.0),
        ("no tool call: calc(12 + 30) = 42\n", 0.0, 0.0, 0.0),
        ("calc(12 + 30) = 42\ncalc(12 + 30) = 42\n", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_the_grader_reads_the_printed_line(line, reward, exact, well_formed):
    result = AgentResult(AgentEnd.EXITED, 0, None, line, "", 0.1, True, False)
    scores = grade(
        load_grader(CONFIG.grader), Task("1", {"answer": 42}), result, SPAN_SCHEMA.empty_table()
    )
    assert scores == {"reward": reward, "exact": exact, "format": well_formed}


def test_importing_the_agent_asks_nothing():
    assert "main" in runpy.run_path(str(FOLDER / "agent.py"), run_name="agent")
