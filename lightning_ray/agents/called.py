"""An agent that is a Python function: it becomes the command that calls it.

Invariant: the interpreter that runs it needs nothing of ours but one file of the standard library.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning_ray.agents.command import find_executable
from lightning_ray.agents.config import AgentConfig, ResultBy, TaskBy
from lightning_ray.errors import UserError

_CALL = Path(__file__).parent / "standalone" / "call.py"
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
_FIND_LIMIT_S = 60.0


def as_command(config: AgentConfig) -> AgentConfig:
    """The agent with the command that calls its function; one that has a command as it is."""
    if config.callable is None:
        return config
    literal = [word.replace("{", "{{").replace("}", "}}") for word in (str(_CALL), config.callable)]
    return replace(
        config,
        command=[config.python or "python", *literal, "{task_file}", "{result_file}"],
        callable=None,
        python=None,
        task_by=TaskBy.file,
        result_by=ResultBy.file,
    )


def own_packages(config: AgentConfig) -> set[str]:
    """The package of an agent that is a function in one; it may be installed among libraries."""
    module = (config.callable or "").rpartition(":")[0]
    return set() if not module or module.endswith(".py") else {module.partition(".")[0]}


def check_callable(config: AgentConfig, env: Mapping[str, str], folder: Path) -> None:
    """Find out what is wrong with a callable, without importing it.

    Args:
        env: The environment that its attempts share.
        folder: The folder that it runs in.

    Raises:
        UserError: the spec is malformed, there is no such file, module or interpreter, or a setting
            is given that is a command's.
    """
    spec = config.callable or ""
    source, _, name = spec.rpartition(":")
    dotted = not source.endswith(".py")
    parts = source.split(".") if dotted else []
    if not source or not name.isidentifier() or not all(part.isidentifier() for part in parts):
        raise UserError(
            f"agent.callable: {spec!r} must be path/to/file.py:function or package.module:function"
        )
    for setting, default in (("task_by", TaskBy.arguments), ("result_by", ResultBy.stdout)):
        if (value := getattr(config, setting)) != default:
            raise UserError(
                f"agent.{setting}={value}: a callable is called with its task and returns its "
                "result; leave it out"
            )
    python = config.python or sys.executable
    python = find_executable(python, env, folder, "agent.python")
    if not dotted:
        if not (folder / source).is_file():
            raise UserError(f"agent.callable: no file {folder / source}; correct the path")
        return
    if _has_module(python, parts[0], env, folder):
        return
    raise UserError(
        f"agent.callable: {python} finds no module {parts[0]!r} from {folder}; install it there, "
        "correct the name, or name the interpreter that has it: agent.python=PATH"
    )


def _has_module(python: str, module: str, env: Mapping[str, str], folder: Path) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", _FIND, module],
            env=dict(env),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_FIND_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"agent.python: {python} does not run: {error}; correct it") from error
    return done.returncode == 0
