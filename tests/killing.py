"""Killing an actor of Ray, and knowing that it is dead."""

import time

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError


def kill_and_wait(actor: ActorHandle, timeout_s: float = 30.0) -> None:
    """Kill `actor` for good, and return once no call reaches it any more.

    `ray.kill` returns before the process is gone, which may answer another call meanwhile.
    """
    ray.kill(actor)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=timeout_s)
        except ActorDiedError:
            return
        time.sleep(0.05)
    raise AssertionError(f"an actor still answers {timeout_s:g} s after it was killed")
