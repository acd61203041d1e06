"""Concurrent clients, the same for both sides; standard library only, as `workload` is."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any


async def together(
    work: Callable[[Any], Awaitable[None]], items: Sequence[Any], clients: int
) -> float:
    """Seconds that `clients` concurrent clients take for all the items, each taking the next."""
    waiting = iter(items)

    async def client() -> None:
        for item in waiting:
            await work(item)

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return time.perf_counter() - begin


def require(have: int, want: int, what: str) -> None:
    """Raises RuntimeError when a measurement did not do its whole work."""
    if have != want:
        raise RuntimeError(f"{have} {what}, {want} were expected")
