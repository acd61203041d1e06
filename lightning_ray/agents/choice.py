"""Which launcher suits an agent, and what is wrong with an agent before anything is started."""

import sys
from collections.abc import Sequence

from lightning_ray.agents.attempt import Attempts
from lightning_ray.agents.called import as_command, check_callable, own_packages
from lightning_ray.agents.command import find_executable, python_script
from lightning_ray.agents.config import AgentConfig
from lightning_ray.agents.environment import base_environment, check_names
from lightning_ray.agents.grader import load_grader
from lightning_ray.agents.launch import CommandLauncher, Launcher, agent_folder
from lightning_ray.agents.service import ServiceLauncher, check_service
from lightning_ray.agents.task import Task
from lightning_ray.agents.warm import WarmLauncher
from lightning_ray.errors import UserError


def make_launcher(config: AgentConfig) -> Launcher:
    """The launcher that suits the agent: warm for `python [-u] SCRIPT.py ARG...` on Linux.

    Raises:
        UserError: the agent is not one of a command, a callable and a service.
    """
    _check_kind(config)
    if config.service.url:
        return ServiceLauncher(config)
    command = as_command(config)
    # Other systems' libraries are not made to be forked after use.
    if config.warm_start and sys.platform == "linux" and python_script(command.command) is not None:
        return WarmLauncher(command, own_packages(config))
    return CommandLauncher(command)


def check_agent(config: AgentConfig, tasks: Sequence[Task]) -> None:
    """Find out what is wrong with an agent before anything expensive is started.

    Raises:
        UserError: no such folder, program or script, a grader that does not load, a task that does
            not fill the command, a limit that is not positive, or settings that contradict each
            other.
    """
    _check_kind(config)
    _check_numbers(config)
    if config.service.url:
        check_service(config)
    else:
        _check_process(config, tasks)
    load_grader(config.grader)


def _check_process(config: AgentConfig, tasks: Sequence[Task]) -> None:
    """What of `check_agent` is about an agent that is started here."""
    check_names(config)
    folder = agent_folder(config)
    env = base_environment(config)
    if config.callable is not None:
        check_callable(config, env, folder)
    elif config.python is not None:
        raise UserError("agent.python is a callable's; begin agent.command with the interpreter")
    config = as_command(config)
    attempts = Attempts(config)
    for task in tasks:
        argv = attempts.sample(task)
    if tasks:
        find_executable(argv[0], env, folder)
    script = python_script(config.command)
    if script is not None and not (folder / script.script).is_file():
        raise UserError(f"agent.command: no script {folder / script.script}; correct the path")


def _check_kind(config: AgentConfig) -> None:
    """Raises UserError unless it says in exactly one way what the agent is."""
    ways = {
        "agent.command": bool(config.command),
        "agent.callable": config.callable is not None,
        "agent.service.url": bool(config.service.url),
    }
    given = [name for name, is_given in ways.items() if is_given]
    if not given:
        raise UserError(f"no agent is given: set one of {', '.join(ways)}")
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} are both given, and an agent is one of them; "
            "leave the others out, a command as agent.command=[]"
        )


def _check_numbers(config: AgentConfig) -> None:
    for name in ("timeout_s", "grader_timeout_s", "max_output_bytes"):
        if getattr(config, name) <= 0:
            raise UserError(f"agent.{name}={getattr(config, name)}: must be above 0")
    for name in ("max_memory_mb", "max_processes"):
        if (limit := getattr(config, name)) is None:
            continue
        if limit <= 0:
            raise UserError(f"agent.{name}={limit}: must be above 0, or null for no limit")
        if sys.platform != "linux":
            raise UserError(f"agent.{name} is watched on Linux alone; leave it out on this system")
    codes = config.graded_exit_codes
    if not codes or not all(0 <= code <= 255 for code in codes):
        raise UserError(f"agent.graded_exit_codes={codes}: give one or more, each 0 to 255")
