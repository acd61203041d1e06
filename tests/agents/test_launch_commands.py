"""Commands that are not Python, and what is found out before anything is started."""

import pytest
from agents_support import with_launcher

from lightning_ray.agents import (
    AgentEnd,
    CommandLauncher,
    Task,
    attempt_environment,
    check_agent,
    make_launcher,
)
from lightning_ray.errors import UserError

TASK = Task("1", {"name": "a b; echo no"})


def run(config):
    return with_launcher(config, lambda launcher: launcher.run(TASK, {}, 10))


def test_any_command_runs_without_a_shell(agent):
    config = agent("", command=["echo", "{name}", "$HOME", "*"])
    assert isinstance(make_launcher(config), CommandLauncher)
    result = run(config)
    assert (result.stdout, result.exit_code, result.warm) == ("a b; echo no $HOME *\n", 0, False)


@pytest.mark.parametrize(
    "command",
    [["python", "-c", "print('hi')"], ["python", "-m", "agent"], ["python", "-I", "agent.py"]],
)
def test_other_forms_of_python_start_cold(agent, command):
    config = agent("print('hi')\n", command=command)
    assert isinstance(make_launcher(config), CommandLauncher)
    assert run(config).stdout == "hi\n"


def test_a_program_relative_to_the_agents_folder_is_found(agent, tmp_path):
    config = agent("", files={"bin/tool": "#!/bin/sh\necho tool $0\n"}, command=["bin/tool"])
    (tmp_path / "agent/bin/tool").chmod(0o755)
    assert run(config).stdout == f"tool {config.cwd}/bin/tool\n"


def test_a_container_gets_its_variables_in_a_file(agent):
    config = agent(
        "",
        command=["sh", "-c", 'cat "$1"; stat -c %a "$(dirname "$1")"', "sh", "{env_file}"],
        inherit_env=["PATH", "HOME"],
        env={"LEVEL": "debug"},
        env_names={"KEY": "OPENAI_API_KEY"},
        task_env={"NAME": "{name}"},
    )
    env = attempt_environment("http://127.0.0.1:9/x", "key")
    result = with_launcher(config, lambda launcher: launcher.run(TASK, env, 10))
    *lines, mode = result.stdout.splitlines()
    given = {**env, "LEVEL": "debug", "KEY": "key", "NAME": TASK.data["name"]}
    assert dict(line.split("=", 1) for line in lines) == given
    assert mode == "700"


def test_a_program_that_cannot_be_executed_is_no_fault_of_the_agent(agent, tmp_path):
    config = agent("", files={"broken": "\0\0not a program"}, command=["./broken"])
    (tmp_path / "agent/broken").chmod(0o755)
    result = run(config)
    assert (result.end, result.exit_code) == (AgentEnd.LAUNCH_FAILED, None)
    assert "broken" in result.fault and "format" in result.fault


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": []}, "no agent is given: set one of agent.command"),
        ({"command": ["no-such-program-here"]}, "no executable 'no-such-program-here' on PATH"),
        ({"command": ["./missing"]}, "no executable './missing' in"),
        ({"command": ["python", "missing.py"]}, "no script .*missing.py"),
        ({"command": ["python", "agent.py", "{nothing}"]}, "task '1' has no field 'nothing'"),
        ({"command": ["python", "agent.py", '{"a": 1}']}, "lone '{'"),
        ({"timeout_s": 0.0}, "must be above 0"),
        (
            {"env_names": {"A": "NO_SUCH"}},
            "agent.env_names.A: an attempt sets no variable 'NO_SUCH'",
        ),
        ({"task_env": {"A": "{no}"}}, "agent.task_env.A: task '1' has no field 'no'"),
        ({"command": ["cat", "{env_file}"], "env": {"A": "1\n2"}}, "{env_file} cannot hold A,"),
        ({"cwd": "/no/such/folder"}, "agent.cwd: no folder /no/such/folder"),
        ({"grader": "missing.py:grade"}, "no file .*missing.py"),
    ],
)
def test_a_wrong_agent_is_refused_in_one_line(agent, tmp_path, change, message):
    config = agent("", files={"grader.py": "def grade(*_): return 0\n"})
    config.grader = str(tmp_path / "agent/grader.py:grade")
    check_agent(config, [TASK])
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message) as caught:
        check_agent(config, [TASK])
    assert "\n" not in str(caught.value)
