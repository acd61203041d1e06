"""Tasks: one input for the agent each, plus whatever its grader needs, read from JSON Lines.

Invariant: ids within a file are unique, and a task without one keeps the same id for as long as its
line keeps its place.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError


@dataclass(frozen=True)
class Task:
    """One input for the agent."""

    id: str
    """Unique in its file."""
    data: dict[str, Any]
    """The JSON object of its line, `id` included where it had one."""


def load_tasks(path: str | Path) -> list[Task]:
    """Read a task file: one JSON object a line, blank lines skipped.

    The id is the object's `id`, or else FILE_STEM:LINE.

    Raises:
        UserError: "PATH:LINE: ..." where the file is missing, empty or not UTF-8, or a line is not
            a JSON object or repeats an id.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the task file: {error.strerror}") from error
    tasks: list[Task] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            data = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); write one object a line") from error
        if not isinstance(data, dict):
            kind = type(data).__name__
            raise UserError(f'{where}: a task must be a JSON object like {{"id": ...}}, not {kind}')
        task_id = data.get("id", f"{path.stem}:{number}")
        if isinstance(task_id, int) and not isinstance(task_id, bool):
            task_id = str(task_id)
        if not isinstance(task_id, str) or not task_id:
            raise UserError(f"{where}: the task's id must be a string or an integer")
        if task_id in first_line:
            raise UserError(
                f"{where}: id {task_id!r} is already that of line {first_line[task_id]}; "
                "give each task its own"
            )
        first_line[task_id] = number
        tasks.append(Task(id=task_id, data=data))
    if not tasks:
        raise UserError(f"{path}:1: the task file is empty; write one JSON object a line")
    return tasks
