"""What one attempt is started with: arguments, environment, input, and a folder of its own.

Invariant: an attempt has a folder only where a setting asks for one. Nobody else can look into it,
and it is gone when the attempt is over, whatever the agent has put there.
"""

import asyncio
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_ray.agents.command import fill_command
from lightning_ray.agents.config import AgentConfig, ResultBy, TaskBy
from lightning_ray.agents.environment import base_environment, merged_environment
from lightning_ray.agents.result import AgentResult
from lightning_ray.agents.task import Task
from lightning_ray.errors import InfrastructureError

_log = logging.getLogger(__name__)

TASK_VARIABLE = "LIGHTNING_RAY_TASK_FILE"
RESULT_VARIABLE = "LIGHTNING_RAY_RESULT_FILE"


@dataclass(frozen=True)
class Attempt:
    """One attempt, ready to be started."""

    argv: list[str]
    env: dict[str, str]
    """Its complete environment."""
    stdin: bytes | None
    """What it reads on standard input; None is nothing."""
    result_file: Path | None
    max_output_bytes: int

    async def result(self, seen: AgentResult) -> AgentResult:
        """What was seen of the run, with what it left in its result file."""
        if self.result_file is None:
            return seen
        text, cut = await asyncio.to_thread(_read_result, self.result_file, self.max_output_bytes)
        return replace(seen, written=text, truncated=seen.truncated or cut)


class Attempts:
    """Prepares the attempts of one agent, and clears away what it made for them."""

    def __init__(self, config: AgentConfig) -> None:
        """Makes nothing yet."""
        self._config = config
        self.base_env = base_environment(config)
        """What all attempts have in common."""
        self._wanted = {
            name: f"{name.removesuffix('_file')}.{ending}"
            for name, ending, wanted in (
                ("task_file", "json", config.task_by is TaskBy.file),
                ("result_file", "out", config.result_by is ResultBy.file),
            )
            if wanted
        }
        self._folder: Path | None = None

    def folder(self) -> Path | None:
        """The folder that holds those of the attempts; None where they need none.

        Raises:
            InfrastructureError: it cannot be made.
        """
        if self._wanted and self._folder is None:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="lightning-ray-agents-"))
            except OSError as error:
                raise InfrastructureError(f"no folder for attempts: {error}") from error
        return self._folder

    def own_names(self, env: Mapping[str, str]) -> set[str]:
        """The variables that differ from attempt to attempt, where `env` is what it sets."""
        return {*env, *self._file_variables(self._wanted)}

    def command(self, task: Task) -> list[str]:
        """The command for a task, with files that are not there, to see whether it can be filled.

        Raises:
            UserError: the task does not fill it.
        """
        return fill_command(self._config.command, task, dict.fromkeys(self._wanted, ""))

    @asynccontextmanager
    async def prepared(self, task: Task, env: Mapping[str, str]) -> AsyncIterator[Attempt]:
        """One attempt at `task`, whose folder is there until the context is left.

        Raises:
            UserError: the task does not fill the command.
            InfrastructureError: its folder cannot be made.
        """
        outer = self.folder()
        if outer is None:
            yield self._attempt(task, env, {})
            return
        try:
            folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=outer))
        except OSError as error:
            raise InfrastructureError(f"no folder for an attempt: {error}") from error
        try:
            places = {name: str(folder / file) for name, file in self._wanted.items()}
            if "task_file" in places:
                try:
                    Path(places["task_file"]).write_bytes(task_json(task))
                except OSError as error:
                    raise InfrastructureError(f"the task file of an attempt: {error}") from error
            yield self._attempt(task, env, places)
        finally:
            await asyncio.to_thread(_remove, folder)

    async def close(self) -> None:
        """Remove the folder of them all. Harmless when repeated."""
        if self._folder is not None:
            folder, self._folder = self._folder, None
            await asyncio.to_thread(_remove, folder)

    def _attempt(self, task: Task, env: Mapping[str, str], places: Mapping[str, str]) -> Attempt:
        result_file = places.get("result_file")
        return Attempt(
            argv=fill_command(self._config.command, task, places),
            env={**merged_environment(self.base_env, env), **self._file_variables(places)},
            stdin=task_json(task) if self._config.task_by is TaskBy.stdin else None,
            result_file=Path(result_file) if result_file is not None else None,
            max_output_bytes=self._config.max_output_bytes,
        )

    def _file_variables(self, places: Mapping[str, str]) -> dict[str, str]:
        names = {"task_file": TASK_VARIABLE, "result_file": RESULT_VARIABLE}
        return {names[place]: path for place, path in places.items()}


def task_json(task: Task) -> bytes:
    """A task as one line of JSON, `id` included, for whoever reads it.

    In ASCII: so it is read rightly whatever encoding the agent's environment makes it assume.
    """
    return json.dumps({**task.data, "id": task.id}).encode("ascii") + b"\n"


def _read_result(path: Path, limit: int) -> tuple[str, bool]:
    """(text, whether it is cut) of a result file; nothing where the agent wrote none."""
    try:
        # What the agent put there may be a link, or a pipe that nobody ever writes to.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return "", False
            with open(fd, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        finally:
            os.close(fd)
    except OSError as error:
        _log.info("no result file: %s", error.strerror)
        return "", False
    return data[:limit].decode("utf-8", "replace"), len(data) > limit


def _remove(folder: Path) -> None:
    """Remove a folder and all that is in it, also where the agent took its own rights away."""

    def insist(function: Callable[..., Any], path: str, _: object) -> None:
        try:
            os.chmod(os.path.dirname(path), stat.S_IRWXU)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, stat.S_IRWXU)
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("a file of an attempt could not be removed: %s", error)

    shutil.rmtree(folder, onerror=insist)
