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

from lightning_ray.agents.command import fill_command, fill_word, places_in
from lightning_ray.agents.config import AgentConfig, ResultBy, TaskBy
from lightning_ray.agents.environment import (
    RESULT_VARIABLE,
    TASK_VARIABLE,
    attempt_environment,
    base_environment,
    env_file,
    merged_environment,
    named_variables,
)
from lightning_ray.agents.result import AgentResult
from lightning_ray.agents.task import Task
from lightning_ray.errors import InfrastructureError

_log = logging.getLogger(__name__)

# The files of an attempt, and the variables that name them, by the places in a command.
_FILES = {"task_file": "task.json", "result_file": "result", "env_file": "env"}
_VARIABLES = {"task_file": TASK_VARIABLE, "result_file": RESULT_VARIABLE}


@dataclass(frozen=True)
class Attempt:
    """One attempt, ready to be started."""

    argv: list[str]
    env: dict[str, str]
    """Its complete environment."""
    env_file: str
    """What of it a container is to get, for `{env_file}`; empty where nobody asks."""
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
        wanted = {
            "task_file": config.task_by == TaskBy.file,
            "result_file": config.result_by == ResultBy.file,
            "env_file": "env_file" in places_in(config.command),
        }
        self._files = [name for name, asked_for in wanted.items() if asked_for]
        self._folder: Path | None = None
        self._closed = False

    def folder(self) -> Path | None:
        """The folder that holds those of the attempts; None where they need none.

        Raises:
            InfrastructureError: it cannot be made, or the attempts are closed.
        """
        if self._files and self._folder is None:
            if self._closed:
                raise InfrastructureError(f"agent {self._config.name}: the launcher is closed")
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="lightning-ray-agents-"))
            except OSError as error:
                raise InfrastructureError(f"no folder for attempts: {error}") from error
        return self._folder

    def own_names(self, env: Mapping[str, str]) -> set[str]:
        """The variables that differ from attempt to attempt, where `env` is what it sets."""
        files = _file_variables(dict.fromkeys(self._files, ""))
        return {*env, *files, *self._config.env_names, *self._config.task_env}

    def sample(self, task: Task) -> list[str]:
        """The command of an attempt at a task that has no address and no files, to look at it.

        Raises:
            UserError: no attempt at it could be started.
        """
        env = attempt_environment("http://127.0.0.1", "key")
        return self._attempt(task, env, dict.fromkeys(self._files, "")).argv

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
            places = {name: str(folder / _FILES[name]) for name in self._files}
            attempt = self._attempt(task, env, places)
            try:
                if "task_file" in places:
                    Path(places["task_file"]).write_bytes(task_json(task))
                if "env_file" in places:
                    Path(places["env_file"]).write_text(attempt.env_file, encoding="utf-8")
            except OSError as error:
                raise InfrastructureError(f"no file for an attempt: {error}") from error
            yield attempt
        finally:
            await asyncio.to_thread(_remove, folder)

    async def close(self) -> None:
        """Remove the folder of them all, for good. Harmless when repeated."""
        self._closed = True
        if self._folder is not None:
            folder, self._folder = self._folder, None
            await asyncio.to_thread(_remove, folder)

    def _attempt(self, task: Task, env: Mapping[str, str], places: Mapping[str, str]) -> Attempt:
        config = self._config
        own = {**env, **_file_variables(places)}
        own |= named_variables(config.env_names, own)
        own |= {
            name: fill_word(word, task, {}, f"agent.task_env.{name}")
            for name, word in config.task_env.items()
        }
        full_env = merged_environment(self.base_env, own)
        listed = {k: v for k, v in full_env.items() if k in own or k in config.env}
        result_file = places.get("result_file")
        return Attempt(
            argv=fill_command(config.command, task, places),
            env=full_env,
            env_file=env_file(listed) if "env_file" in places else "",
            stdin=task_json(task) if config.task_by == TaskBy.stdin else None,
            result_file=Path(result_file) if result_file is not None else None,
            max_output_bytes=config.max_output_bytes,
        )


def _file_variables(places: Mapping[str, str]) -> dict[str, str]:
    return {_VARIABLES[name]: path for name, path in places.items() if name in _VARIABLES}


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
