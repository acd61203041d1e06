"""What the tests of the agents' room share: launchers used to their end, and processes gone."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_ray.agents import AgentConfig, AgentResult, Task, WarmLauncher, make_launcher

T = TypeVar("T")


def with_launcher(
    config: AgentConfig, use: Callable[[Any], Awaitable[T]], timeout_s: float = 60
) -> T:
    """Start a launcher, use it, close it, all within a time limit."""

    async def main() -> T:
        launcher = make_launcher(config)
        await launcher.start()
        try:
            async with asyncio.timeout(timeout_s):
                return await use(launcher)
        finally:
            await launcher.close()

    return asyncio.run(main())


async def warmed(launcher: WarmLauncher, task: Task, env: Mapping[str, str]) -> AgentResult:
    """The result of the run that the launcher learns from, once it has learnt or given up."""
    first = await launcher.run(task, env, 30)
    deadline = time.monotonic() + 30
    while not launcher.preloaded and not launcher.cold_reason:
        assert time.monotonic() < deadline, "the launcher never learnt"
        await asyncio.sleep(0.02)
    return first


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def assert_gone(pids: list[int], within_s: float = 3.0) -> None:
    """Fail unless all of these processes end within the time."""
    deadline = time.monotonic() + within_s
    while any(is_running(pid) for pid in pids):
        alive = [pid for pid in pids if is_running(pid)]
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, 9)
            raise AssertionError(f"still running: {alive}")
        time.sleep(0.02)
