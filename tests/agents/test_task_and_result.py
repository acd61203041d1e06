"""How an agent gets its task and leaves its result, cold and warm; and nothing is left of it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from agents_support import warmed, with_launcher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_ray.agents import (
    AgentEnd,
    ResultBy,
    Task,
    TaskBy,
    WarmLauncher,
    attempt_environment,
    check_agent,
)
from lightning_ray.agents.attempt import Attempts, task_json
from lightning_ray.errors import UserError

ATTEMPT = attempt_environment("http://127.0.0.1:9/attempt", "key")
TASK = Task("t7", {"question": "Wie groß? ☃ \ud800", "n": [1, None]})
WHOLE = {**TASK.data, "id": "t7"}

warm_and_cold = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where attempts get their folders; empty again after every test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def run(config, warm=False, task=TASK, timeout_s=30.0):
    """One result; a warm one is a fork of a process that has learnt from an earlier run."""

    async def use(launcher):
        if isinstance(launcher, WarmLauncher):
            await warmed(launcher, task, ATTEMPT)
            assert not launcher.cold_reason
        return await launcher.run(task, ATTEMPT, timeout_s)

    config.warm_start = warm
    result = with_launcher(config, use)
    assert result.warm == warm
    return result


@warm_and_cold
def test_a_task_on_standard_input_is_one_line_of_json(agent, warm):
    source = "import sys\nprint(sys.stdin.readline(), end='')\nassert not sys.stdin.read()\n"
    result = run(agent(source, task_by=TaskBy.stdin), warm)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == WHOLE and result.stdout.endswith("\n")


@warm_and_cold
def test_a_task_that_the_agent_does_not_read_holds_nobody_up(agent, warm):
    task = Task("big", {"text": "x" * 3_000_000})
    result = run(agent("print('done')\n", task_by=TaskBy.stdin), warm, task)
    assert (result.stdout, result.exit_code) == ("done\n", 0)


def test_without_it_standard_input_is_empty(agent):
    assert run(agent("import sys\nprint(repr(sys.stdin.read()))\n")).stdout == "''\n"


@warm_and_cold
def test_a_task_file_is_named_in_the_command_and_in_the_environment(agent, warm):
    source = """
import os, stat, sys
path = sys.argv[1]
assert path == os.environ["LIGHTNING_RAY_TASK_FILE"]
assert "LIGHTNING_RAY_RESULT_FILE" not in os.environ
assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
print(open(path).read(), end="")
"""
    config = agent(source, "{task_file}", task_by=TaskBy.file, env={"LC_ALL": "C"})
    result = run(config, warm)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == WHOLE


@warm_and_cold
def test_a_result_file_is_the_output_and_stdout_stays_as_it_is(agent, warm):
    source = """
import os, sys
assert sys.argv[1] == os.environ["LIGHTNING_RAY_RESULT_FILE"]
open(sys.argv[1], "wb").write("ä".encode() + b"\\xff")
print("chatter")
"""
    result = run(agent(source, "{result_file}", result_by=ResultBy.file), warm)
    assert result.exit_code == 0, result.stderr
    assert (result.output, result.written, result.stdout) == ("ä\ufffd", "ä\ufffd", "chatter\n")
    assert not result.truncated


@pytest.mark.parametrize(
    "leave",
    [
        "pass",
        "os.mkfifo(path)",
        "os.symlink('/etc/passwd', path)",
        "os.mkdir(path)",
    ],
)
def test_what_is_no_result_file_is_an_empty_result(agent, leave):
    source = f"import os\npath = os.environ['LIGHTNING_RAY_RESULT_FILE']\n{leave}\nprint('x')\n"
    result = run(agent(source, result_by=ResultBy.file))
    assert (result.end, result.exit_code) == (AgentEnd.EXITED, 0), result.stderr
    assert (result.output, result.stdout) == ("", "x\n")


def test_a_long_result_file_is_cut(agent):
    source = "import os\nopen(os.environ['LIGHTNING_RAY_RESULT_FILE'], 'w').write('x' * 5000)\n"
    result = run(agent(source, result_by=ResultBy.file, max_output_bytes=1000))
    assert result.output == "x" * 1000 and result.truncated


def test_without_a_result_file_the_output_is_what_was_printed(agent):
    result = run(agent("print('said')\n"))
    assert (result.output, result.written) == ("said\n", None)


def test_commands_that_are_not_python_get_the_same(agent):
    script = 'cat; cat "$1" "$LIGHTNING_RAY_TASK_FILE" > "$LIGHTNING_RAY_RESULT_FILE"; exit 3'
    command = ["sh", "-c", script, "sh", "{task_file}"]
    config = agent("", command=command, task_by=TaskBy.file, result_by=ResultBy.file)
    result = run(config)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.output == task_json(TASK).decode() * 2
    config = agent("", command=["cat"], task_by=TaskBy.stdin)
    assert run(config).stdout == task_json(TASK).decode()


MESS = """
import os, sys, time
folder = os.path.dirname(os.environ["LIGHTNING_RAY_TASK_FILE"])
os.makedirs(folder + "/a/b")
open(folder + "/a/b/c", "w").write("x")
os.symlink("/etc", folder + "/a/etc")
os.chmod(folder + "/a/b", 0)
os.chmod(folder + "/a", 0)
os.chmod(folder, 0)
print("made", flush=True)
if sys.argv[1:]: open(sys.argv[1], "w").write(folder + "\\n"); time.sleep(300)
"""


@warm_and_cold
def test_nothing_is_left_of_an_attempt_whatever_it_made(agent, scratch, warm):
    config = agent(MESS, task_by=TaskBy.file)
    assert run(config, warm).stdout == "made\n"
    config.command = ["python", "agent.py", config.cwd + "/where"]
    config.warm_start = False

    async def use(launcher):
        timed_out = await launcher.run(TASK, ATTEMPT, 1.0)
        cancelled = asyncio.create_task(launcher.run(TASK, ATTEMPT, 60))
        await asyncio.sleep(1)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        (launchers,) = scratch.iterdir()
        assert list(launchers.iterdir()) == []
        return timed_out

    assert with_launcher(config, use).end is AgentEnd.TIMED_OUT
    assert os.path.isdir("/etc")


def test_agents_that_need_no_folder_get_none(agent, scratch):
    source = "import os\nprint(os.listdir(os.environ['WHERE']))\n"
    assert run(agent(source, env={"WHERE": str(scratch)})).stdout == "[]\n"


OWNER = """
import asyncio, sys, tempfile
from lightning_ray.agents import AgentConfig, Task, TaskBy, attempt_environment, make_launcher
tempfile.tempdir = sys.argv[3]
async def main():
    command = ["python", "agent.py", sys.argv[2]]
    config = AgentConfig(name="a", command=command, cwd=sys.argv[1], grader="x:y",
                         task_by=TaskBy.file, warm_start=sys.argv[4] == "True")
    launcher = make_launcher(config)
    await launcher.start()
    await launcher.run(Task("1", {}), attempt_environment("http://127.0.0.1:9", "key"), 300)
asyncio.run(main())
"""


@warm_and_cold
def test_folders_go_with_a_killed_owner(agent, scratch, warm):
    config = agent(MESS)
    where = Path(config.cwd, "where")
    command = [sys.executable, "-c", OWNER, config.cwd, str(where), str(scratch), str(warm)]
    owner = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not where.exists() or not where.read_text().endswith("\n"):
        assert owner.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert list(scratch.iterdir())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    while list(scratch.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)


text = st.text(st.characters(exclude_characters="\0"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(text, text | st.integers() | st.none() | st.lists(text), max_size=4))
def test_a_task_is_read_back_as_it_was(data):
    line = task_json(Task("7", data))
    assert line.count(b"\n") == 1 and line.isascii()
    assert json.loads(line) == {**data, "id": "7"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graded_exit_codes": []}, "agent.graded_exit_codes=.*give one or more, each 0 to 255"),
        ({"graded_exit_codes": [0, 256]}, "agent.graded_exit_codes"),
        ({"command": ["cat", "{task_file}"]}, "no field 'task_file'.*agent.task_by=file"),
        ({"command": ["cat", "{result_file}"]}, "no field 'result_file'.*agent.result_by=file"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(agent, tmp_path, change, message):
    config = agent("", files={"grader.py": "def grade(*_): return 0\n"})
    config.grader = str(tmp_path / "agent/grader.py:grade")
    check_agent(config, [TASK])
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message) as caught:
        check_agent(config, [TASK])
    assert "\n" not in str(caught.value)


def test_files_pass_the_check_before_they_are_there(agent, tmp_path):
    config = agent("", "{task_file}", "{result_file}", task_by=TaskBy.file)
    config.result_by = ResultBy.file
    config.command.append("{question}")
    Path(config.cwd, "grader.py").write_text("def grade(*_): return 0\n")
    config.grader = f"{config.cwd}/grader.py:grade"
    check_agent(config, [TASK])
    assert Attempts(config).own_names(ATTEMPT) == {
        *ATTEMPT, "LIGHTNING_RAY_TASK_FILE", "LIGHTNING_RAY_RESULT_FILE"
    }  # fmt: skip
