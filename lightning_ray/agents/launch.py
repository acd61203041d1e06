"""Launching agents: the protocol, and the launcher that starts any command anew.

Invariant: whatever happens to a run, nothing of its process group outlives it.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from lightning_ray.agents.attempt import Attempts
from lightning_ray.agents.command import find_executable
from lightning_ray.agents.config import AgentConfig
from lightning_ray.agents.forkserver import ForkServer
from lightning_ray.agents.job import Job
from lightning_ray.agents.result import AgentResult
from lightning_ray.agents.task import Task
from lightning_ray.errors import InfrastructureError, UserError


class Launcher(Protocol):
    """Runs an agent on tasks. `start` first, `close` last; `run` any number of times at once."""

    async def start(self) -> None:
        """Make ready to run. Cheap: a few milliseconds.

        Raises:
            UserError: the agent cannot be run as configured.
            InfrastructureError: the machine refuses.
        """

    async def run(self, task: Task, env: Mapping[str, str], timeout_s: float) -> AgentResult:
        """Run the agent on one task.

        However it ends, its process group is gone by then. Cancelling kills the group and raises
        `asyncio.CancelledError`.

        Args:
            env: The attempt's own variables, on top of those that the configuration lists.
            timeout_s: Seconds until it is asked to stop; shortly after, it is killed.

        Raises:
            UserError: the task does not fill the command.
            InfrastructureError: the launcher is closed, or the machine refuses.
        """

    async def close(self) -> None:
        """Stop all runs, which end as CANCELLED, and free everything. Harmless when repeated."""


class CommandLauncher:
    """Starts each run as the command it is, in any language.

    A small helper process does the forking: a large, threaded process should not, and the helper
    clears away every agent should this process die.
    """

    def __init__(self, config: AgentConfig, attempts: Attempts | None = None) -> None:
        """`attempts`: who prepares the attempts, where another launcher of this agent does too."""
        self._config = config
        self._cwd = agent_folder(config)
        self._attempts = attempts or Attempts(config)
        self._server: ForkServer | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        """See `Launcher.start`."""
        await self._live_server()

    async def run(self, task: Task, env: Mapping[str, str], timeout_s: float) -> AgentResult:
        """See `Launcher.run`."""
        server = await self._live_server()
        async with self._attempts.prepared(task, env) as attempt:
            path = find_executable(attempt.argv[0], attempt.env, self._cwd)
            job = Job(
                attempt.argv,
                attempt.env,
                path=path,
                stdin=attempt.stdin,
                max_memory_mb=self._config.max_memory_mb,
                max_processes=self._config.max_processes,
            )
            seen = await server.run(job, timeout_s, self._config.max_output_bytes)
            return await attempt.result(seen)

    async def close(self) -> None:
        """See `Launcher.close`."""
        self._closed = True
        if self._server is not None:
            await self._server.close()
        await self._attempts.close()

    async def _live_server(self) -> ForkServer:
        async with self._starting:
            if self._closed:
                raise InfrastructureError(f"agent {self._config.name}: the launcher is closed")
            if self._server is None or not self._server.alive:
                if self._server is not None:
                    await self._server.close()
                # -I -S: nothing but the standard library, up in 10 ms.
                command = [sys.executable, "-I", "-S"]
                self._server = ForkServer(
                    command, self._attempts.base_env, self._cwd, scratch=self._attempts.folder()
                )
                await self._server.start()
            return self._server


def agent_folder(config: AgentConfig) -> Path:
    """The folder that the agent runs in, absolute.

    Raises:
        UserError: it does not exist.
    """
    folder = Path(config.cwd).expanduser() if config.cwd is not None else Path.cwd()
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise UserError(f"agent.cwd: no folder {folder}; correct it")
    return folder
