"""Which launcher suits an agent, and what is wrong with an agent before anything is started."""

import sys
from collections.abc import Sequence

from lightning_ray.agents.attempt import Attempts
from lightning_ray.agents.command import find_executable, python_script
from lightning_ray.agents.config import AgentConfig
from lightning_ray.agents.environment import base_environment, check_names
from lightning_ray.agents.grader import load_grader
from lightning_ray.agents.launch import CommandLauncher, Launcher, agent_folder
from lightning_ray.agents.task import Task
from lightning_ray.agents.warm import WarmLauncher
from lightning_ray.errors import UserError


def make_launcher(config: AgentConfig) -> Launcher:
    """The launcher that suits the agent: warm for `python [-u] SCRIPT.py ARG...` on Linux."""
    # Other systems' libraries are not made to be forked after use.
    if config.warm_start and sys.platform == "linux" and python_script(config.command) is not None:
        return WarmLauncher(config)
    return CommandLauncher(config)


def check_agent(config: AgentConfig, tasks: Sequence[Task]) -> None:
    """Find out what is wrong with an agent before anything expensive is started.

    Raises:
        UserError: no such folder, program or script, a grader that does not load, a task that does
            not fill the command, or a limit that is not positive.
    """
    if not config.command:
        raise UserError("agent.command is empty; give the agent's command line as a list")
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
    check_names(config)
    folder = agent_folder(config)
    env = base_environment(config)
    attempts = Attempts(config)
    for task in tasks:
        argv = attempts.sample(task)
    if tasks:
        find_executable(argv[0], env, folder)
    script = python_script(config.command)
    if script is not None and not (folder / script.script).is_file():
        raise UserError(f"agent.command: no script {folder / script.script}; correct the path")
    load_grader(config.grader)
