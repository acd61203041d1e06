"""What the tests of the agents' room share: launchers used to their end, and processes gone."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lightning_ray.agents import (
    AgentConfig,
    AgentResult,
    Task,
    WarmLauncher,
    attempt_environment,
    make_launcher,
)

T = TypeVar("T")

ATTEMPT = attempt_environment("http://127.0.0.1:9/attempt", "key", {"SNOWMAN": "☃ = x"})


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


def both(config: AgentConfig, tasks: list[Task]) -> list[tuple[AgentResult, AgentResult]]:
    """(cold, warm) for each task; the warm ones are forks of a process with the libraries."""

    async def cold(launcher):
        return [await launcher.run(task, ATTEMPT, 30) for task in tasks]

    async def warm(launcher):
        assert isinstance(launcher, WarmLauncher)
        await warmed(launcher, Task("learn", {"case": "learn"}), ATTEMPT)
        assert not launcher.cold_reason
        results = [await launcher.run(task, ATTEMPT, 30) for task in tasks]
        assert all(result.warm for result in results)
        return results

    colds = with_launcher(replace(config, warm_start=False), cold)
    assert not any(result.warm for result in colds)
    return list(zip(colds, with_launcher(config, warm), strict=True))


def visible(result: AgentResult) -> tuple:
    """How it ended, what it printed and wrote, addresses and the names of its folders aside."""
    said = [
        re.sub(r"0x[0-9a-f]{8,}|/lightning-ray-agents-\w+/\w+", "0x", text)
        for text in (result.stdout, result.stderr, result.output)
    ]
    return (result.end, result.exit_code, result.signal, *said)


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
