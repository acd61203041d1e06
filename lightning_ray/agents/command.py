"""The command of an agent: an argument vector with places for a task's fields.

Invariant: what a task holds ends up inside one argument, as it is. No shell ever sees it.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ray.agents.task import Task
from lightning_ray.errors import UserError

_PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.-]*)\}|[{}]")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")
# Places that are there only under a setting.
_NEEDS = {"task_file": "agent.task_by=file", "result_file": "agent.result_by=file"}


@dataclass(frozen=True)
class PythonScript:
    """A command of the form `python [-u] SCRIPT ARG...`, the one that can be started warm."""

    flags: tuple[str, ...]
    """What stands between the interpreter and the script."""
    script: str
    """The script, as the command names it."""

    @property
    def index(self) -> int:
        """Where in the argument vector the script stands."""
        return 1 + len(self.flags)


def fill_command(
    template: Sequence[str], task: Task, places: Mapping[str, str] | None = None
) -> list[str]:
    """The argument vector for a task; the interpreter that runs us stands in for a bare `python`.

    A field that is no string is written as JSON. `{id}` is the task's id, whether or not its line
    had one.

    Args:
        places: What the attempt has of its own, by name; a task's field of that name is not used.

    Raises:
        UserError: the task lacks a field, a value holds a NUL, or a brace stands alone.
    """
    argv = [fill_word(word, task, places, "agent.command") for word in template]
    if template[0] in ("python", "python3"):
        argv[0] = sys.executable
    return argv


def fill_word(template: str, task: Task, places: Mapping[str, str] | None, setting: str) -> str:
    """One template filled as `fill_command` fills each of its words.

    Args:
        setting: Where the template stands, for what is said of it.

    Raises:
        UserError: as `fill_command`.
    """
    values = {**task.data, "id": task.id, **(places or {})}

    def fill(match: re.Match[str]) -> str:
        text = match.group()
        if text in ("{{", "}}"):
            return text[0]
        field = match.group(1)
        if field is None:
            raise UserError(
                f"{setting}: lone {text!r} in {match.string!r}; write {text * 2!r} for a brace"
            )
        if field not in values:
            known = ", ".join(sorted(values))
            hint = f"; it needs {_NEEDS[field]}" if field in _NEEDS else ""
            raise UserError(
                f"{setting}: task {task.id!r} has no field {field!r} (it has: {known}){hint}"
            )
        value = values[field]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    word = _PLACE.sub(fill, template)
    if "\0" in word:
        raise UserError(
            f"{setting}: task {task.id!r} has a field with a NUL character, which no command line "
            "can hold; remove it from the task"
        )
    return word


def places_in(template: Sequence[str]) -> set[str]:
    """The names that stand in braces in a command."""
    return {match[1] for word in template for match in _PLACE.finditer(word) if match[1]}


def find_executable(
    word: str, env: Mapping[str, str], cwd: Path, setting: str = "agent.command"
) -> str:
    """The path of the program that a command's first word names, in the agent's environment.

    Args:
        setting: Where the word stands, for what is said of it.

    Raises:
        UserError: there is none.
    """
    search = env.get("PATH", os.defpath)
    # A name with a slash is relative to the folder that the agent runs in.
    name = str(cwd / word) if "/" in word else word
    found = shutil.which(name, path=search)
    if found is None:
        where = f"in {cwd}" if "/" in word else f"on PATH ({search})"
        raise UserError(f"{setting}: no executable {word!r} {where}; install or correct it")
    return os.path.join(cwd, found)


def python_script(template: Sequence[str]) -> PythonScript | None:
    """The template as a Python script to run, or None where it is anything else."""
    if not template or not _PYTHON.fullmatch(Path(template[0]).name):
        return None
    flags = tuple(template[1:2]) if template[1:2] == ["-u"] else ()
    rest = template[1 + len(flags) :]
    if not rest or rest[0].startswith("-") or not rest[0].endswith(".py"):
        return None
    if "{" in rest[0] or "}" in rest[0]:
        return None
    return PythonScript(flags=flags, script=rest[0])
