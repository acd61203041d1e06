"""Agents that are Python functions: called in a process of their own, warm and cold."""

import ast
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from agents_support import is_running, warmed, with_launcher
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.agents import AgentEnd, Task, WarmLauncher, attempt_environment, check_agent
from lightning_ray.agents.called import as_command
from lightning_ray.agents.command import fill_command
from lightning_ray.agents.config import AgentConfig
from lightning_ray.agents.standalone import call
from lightning_ray.errors import UserError

ATTEMPT = attempt_environment("http://127.0.0.1:9/attempt", "key")
LEARN = Task("learn", {"case": "learn"})
warm_and_cold = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])

AGENT = """
import asyncio, json, os, sys, time
import helper
def run(task):
    case = task["case"]
    if case == "text": return "wörds\\nand ☃ \\ud800"
    if case == "number": return 42
    if case == "object": return {"task": task, "list": [1.5, None, "ä"]}
    if case == "nothing": print("on stdout"); return None
    if case == "raises": return {}["missing"]
    if case == "exits": sys.exit(3)
    if case == "no json": return {1, 2}
    if case == "hangs": time.sleep(300)
    if case == "world":
        return {"argv": sys.argv, "main": os.path.basename(sys.modules["__main__"].__file__),
                "name": __name__, "file": __file__, "path": sys.path[:2], "cwd": os.getcwd(),
                "helper": helper.VALUE, "stdin": sys.stdin.read(),
                "url": os.environ["OPENAI_BASE_URL"],
                "modules": [m for m in ("config", "call") if m in sys.modules]}
async def wait(task):
    await asyncio.sleep(0)
    return f"waited for {task['id']}"
class Callable:
    async def __call__(self, task): return "from an object"
instance = Callable()
class Agent:
    async def run(self): return os.environ["CASE"]
"""


@pytest.fixture
def function(agent):
    """A configuration whose agent is a function of agent.py."""

    def make(name="run", **settings):
        files = {"helper.py": "VALUE = 'own'\n", **settings.pop("files", {})}
        settings = {"command": [], "callable": f"agent.py:{name}", **settings}
        return agent(AGENT, files=files, **settings)

    return make


def run_case(config, case, warm, timeout_s=30.0):
    async def use(launcher):
        if isinstance(launcher, WarmLauncher):
            await warmed(launcher, LEARN, ATTEMPT)
            assert not launcher.cold_reason
        return await launcher.run(Task("t1", {"case": case}), ATTEMPT, timeout_s)

    config.warm_start = warm
    result = with_launcher(config, use)
    assert result.warm == warm
    return result


@warm_and_cold
@pytest.mark.parametrize(
    ("case", "output"),
    [
        ("text", "wörds\nand ☃ \\ud800"),
        ("number", "42"),
        ("object", '{"task": {"case": "object", "id": "t1"}, "list": [1.5, null, "ä"]}'),
        ("nothing", ""),
    ],
)
def test_what_a_function_returns_is_the_output(function, warm, case, output):
    result = run_case(function(), case, warm)
    assert (result.end, result.exit_code) == (AgentEnd.EXITED, 0), result.stderr
    assert result.output == output
    assert result.stdout == ("on stdout\n" if case == "nothing" else "")


@warm_and_cold
@pytest.mark.parametrize(
    ("name", "output"), [("wait", "waited for t1"), ("instance", "from an object")]
)
def test_a_coroutine_is_waited_for(function, warm, name, output):
    result = run_case(function(name), "any", warm)
    assert (result.output, result.exit_code) == (output, 0), result.stderr


@warm_and_cold
def test_a_class_is_made_and_run_and_reads_its_task_from_the_environment(function, warm):
    result = run_case(function("Agent", task_env={"CASE": "{case}"}), "any", warm)
    assert (result.output, result.exit_code) == ("any", 0), result.stderr


@warm_and_cold
def test_a_function_that_fails_is_a_run_that_failed(function, warm):
    raised = run_case(function(), "raises", warm)
    assert (raised.end, raised.exit_code, raised.output) == (AgentEnd.EXITED, 1, "")
    assert raised.stderr.endswith("KeyError: 'missing'\n") and "agent.py" in raised.stderr
    assert run_case(function(), "exits", warm).exit_code == 3
    odd = run_case(function(), "no json", warm)
    assert odd.exit_code == 1 and "agent.py:run returned what is no JSON" in odd.stderr


def test_a_function_that_is_not_there_is_named(function):
    result = run_case(function("other"), "any", False)
    assert result.exit_code == 1 and "agent.py has no function 'other'" in result.stderr


@warm_and_cold
def test_a_function_that_hangs_is_stopped(function, warm):
    result = run_case(function(), "hangs", warm, 1.0)
    assert (result.end, result.output) == (AgentEnd.TIMED_OUT, "")


def test_a_function_finds_the_same_world_warm_and_cold(function):
    cold, warm = (run_case(function(), "world", warm) for warm in (False, True))
    assert cold.exit_code == 0, cold.stderr
    assert json.loads(cold.output) == json.loads(warm.output)
    world = json.loads(cold.output)
    folder = function().cwd
    assert world["argv"] == [f"{folder}/agent.py"] and world["name"] == "agent"
    assert world["path"][0] == world["cwd"] == folder and world["helper"] == "own"
    assert world["modules"] == [] and world["stdin"] == ""


@warm_and_cold
def test_a_function_may_be_a_packages(function, warm):
    files = {"pack/__init__.py": "", "pack/deep.py": "def run(task): return task['case']\n"}
    config = function(files=files, callable="pack.deep:run")
    assert run_case(config, "here", warm).output == "here"


def test_a_package_among_the_libraries_is_the_agents_own(function):
    files = {
        "site-packages/installed.py": "import other\nKEPT = []\n"
        "def run(task):\n    KEPT.append(1)\n    return len(KEPT) + other.VALUE\n",
        "site-packages/other.py": "VALUE = 10\n",
    }
    config = function(files=files, callable="installed:run")
    config.env = {"PYTHONPATH": f"{config.cwd}/site-packages"}

    async def use(launcher):
        await warmed(launcher, LEARN, ATTEMPT)
        return launcher.preloaded, (await launcher.run(LEARN, ATTEMPT, 30)).output

    preloaded, output = with_launcher(config, use)
    assert output == "11" and "other" in preloaded and "installed" not in preloaded


@pytest.fixture(scope="module")
def other_python(tmp_path_factory):
    """An interpreter in an environment of its own, with one library in it and nothing of ours."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True, timeout=120)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "only_there.py").write_text(
        "import importlib.util, sys\n"
        "def run(task):\n"
        "    ours = [importlib.util.find_spec(m) for m in ('lightning_ray', 'pyarrow')]\n"
        "    return {'prefix': sys.prefix, 'ours': ours}\n"
    )
    return folder / "bin" / "python"


@warm_and_cold
def test_a_function_runs_in_an_interpreter_that_has_nothing_of_ours(function, warm, other_python):
    config = function(callable="only_there:run", python=str(other_python))
    result = run_case(config, "any", warm)
    assert result.exit_code == 0, result.stderr
    prefix = str(other_python.parents[1])
    assert json.loads(result.output) == {"prefix": prefix, "ours": [None, None]}


def test_what_is_called_there_is_of_the_standard_library_alone():
    tree = ast.parse(Path(call.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert imported <= sys.stdlib_module_names


def test_nothing_of_a_cancelled_call_is_left(function, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    source = "import os, time\ndef run(task):\n    open('pid', 'w').write(f'{os.getpid()} ')\n"
    source += "    time.sleep(300)\n"
    config = function(files={"slow.py": source}, callable="slow.py:run", warm_start=False)
    pid_file = Path(config.cwd, "pid")

    async def use(launcher):
        run = asyncio.create_task(launcher.run(LEARN, ATTEMPT, 60))
        while not pid_file.exists() or not pid_file.read_text().endswith(" "):
            await asyncio.sleep(0.02)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    with_launcher(config, use)
    assert not is_running(int(pid_file.read_text())) and list(scratch.iterdir()) == []


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(words)
def test_whatever_its_path_a_callable_becomes_a_command_that_names_it(path):
    config = as_command(AgentConfig(callable=f"{path}.py:run"))
    places = {"task_file": "T", "result_file": "R"}
    python, script, *rest = fill_command(config.command, LEARN, places)
    assert (python, script) == (sys.executable, call.__file__)
    assert rest == [f"{path}.py:run", "T", "R"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"callable": None},
            "no agent is given: set one of agent.command, agent.callable, agent.s",
        ),
        ({"command": ["true"]}, "agent.command and agent.callable.* are both given"),
        ({"callable": "agent.py"}, "'agent.py' must be path/to/file.py:function or package"),
        ({"callable": "a b:run"}, "must be path/to/file.py:function"),
        ({"callable": "missing.py:run"}, "agent.callable: no file .*/agent/missing.py"),
        (
            {"callable": "no_such_module.part:run"},
            "finds no module 'no_such_module' from .*/agent;",
        ),
        ({"python": "./no/python"}, "agent.python: no executable './no/python' in .*/agent"),
        ({"task_by": "file"}, "agent.task_by=file: a callable is called with its task"),
        ({"callable": None, "command": ["true"], "python": "x"}, "agent.python is a callable's"),
    ],
)
def test_a_wrong_callable_is_refused_in_one_line(function, tmp_path, change, message):
    config = function(files={"grader.py": "def grade(*_): return 0\n"})
    config.grader = str(tmp_path / "agent/grader.py:grade")
    check_agent(config, [LEARN])
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message) as caught:
        check_agent(config, [LEARN])
    assert "\n" not in str(caught.value)
