"""Asking the queue's actor, through a restart of it."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray

from lightning_ray.errors import InfrastructureError

RETRY_EVERY_S = 0.2


def ask(make: Callable[[], "ray.ObjectRef"], timeout_s: float, what: str) -> Any:
    """The answer to a call that may be repeated. Raises InfrastructureError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(make(), timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            raise _late(what, timeout_s) from error
        except ray.exceptions.RayActorError as error:
            _again(error, deadline, what, timeout_s)
        time.sleep(RETRY_EVERY_S)


async def ask_async(make: Callable[[], "ray.ObjectRef"], timeout_s: float, what: str) -> Any:
    """As `ask`, for a caller that runs an event loop."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await asyncio.wait_for(make(), max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise _late(what, timeout_s) from error
        except ray.exceptions.RayActorError as error:
            _again(error, deadline, what, timeout_s)
        await asyncio.sleep(RETRY_EVERY_S)


def _again(error: Exception, deadline: float, what: str, timeout_s: float) -> None:
    """Returns when asking again may help: an actor that restarts is unavailable, not dead."""
    if not isinstance(error, ray.exceptions.ActorUnavailableError):
        raise InfrastructureError(f"the rollout queue died: {error}") from error
    if time.monotonic() > deadline:
        raise _late(what, timeout_s) from error


def _late(what: str, timeout_s: float) -> InfrastructureError:
    return InfrastructureError(f"the rollout queue did not {what} within {timeout_s:g} s")
