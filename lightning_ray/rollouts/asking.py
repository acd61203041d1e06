"""Asking the queue's actor, through a restart of it."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray

from lightning_ray.errors import InfrastructureError, own_error

RETRY_EVERY_S = 0.2
TRY_S = 10.0
"""One try, at most, and at most a quarter of the time that there is. Ray may neither answer a call
that meets its actor's death nor say that it is lost."""
_ENDS = (
    ray.exceptions.RayActorError,
    ray.exceptions.RayTaskError,
    ray.exceptions.OutOfMemoryError,
)
"""What a call ends with that may have to be made again, see `_again`."""


class RestartingError(InfrastructureError):
    """The queue could not keep what it was told and starts again; tell it once more."""


def ask(
    make: Callable[[], "ray.ObjectRef"], timeout_s: float, what: str, wait_s: float = 0.0
) -> Any:
    """The answer to a call that may be repeated. Raises InfrastructureError after `timeout_s`.

    `wait_s`: for how long the queue may keep the call on purpose. What is not answered some seconds
    after that (TRY_S) is asked once more.
    """
    deadline = time.monotonic() + timeout_s
    one_try = wait_s + min(TRY_S, (timeout_s - wait_s) / 4)
    why = ""
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            return ray.get(make(), timeout=min(left, one_try))
        except ray.exceptions.GetTimeoutError as error:
            if time.monotonic() >= deadline:
                raise _late(what, timeout_s, why) from error
        except _ENDS as error:
            why = _again(error) or why
            if time.monotonic() > deadline:
                raise _late(what, timeout_s, why) from error
        time.sleep(RETRY_EVERY_S)


async def ask_async(
    make: Callable[[], "ray.ObjectRef"], timeout_s: float, what: str, wait_s: float = 0.0
) -> Any:
    """As `ask`, for a caller that runs an event loop."""
    deadline = time.monotonic() + timeout_s
    one_try = wait_s + min(TRY_S, (timeout_s - wait_s) / 4)
    why = ""
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            return await asyncio.wait_for(make(), min(left, one_try))
        except TimeoutError as error:
            if time.monotonic() >= deadline:
                raise _late(what, timeout_s, why) from error
        except _ENDS as error:
            why = _again(error) or why
            if time.monotonic() > deadline:
                raise _late(what, timeout_s, why) from error
        await asyncio.sleep(RETRY_EVERY_S)


def _again(error: Exception) -> str:
    """Returns when asking again may help: why it has to be, where the queue said so.

    An actor that restarts is unavailable, not dead. Else raises what the queue raised, or
    InfrastructureError.
    """
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        # Ray ended its process, to have memory for others, and restarts it.
        return ": its node was short of memory"
    own = own_error(error)
    if isinstance(own, RestartingError):
        return f": {own}"
    if isinstance(error, ray.exceptions.RayTaskError):
        raise own from None
    if not isinstance(error, ray.exceptions.ActorUnavailableError):
        raise InfrastructureError(f"the rollout queue died: {error}") from error
    return ""


def _late(what: str, timeout_s: float, why: str) -> InfrastructureError:
    return InfrastructureError(f"the rollout queue did not {what} within {timeout_s:g} s{why}")
