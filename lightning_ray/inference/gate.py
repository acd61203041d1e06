"""The gate between calls and a change of weights.

Invariant: no call enters while the weights change. Where a change waits for the calls inside
(`drain`), the version that `enter` returned sampled them whole; else vLLM says which sampled what.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lightning_ray.errors import InfrastructureError


class WeightGate:
    """Counts the calls inside; belongs to one event loop."""

    def __init__(self, version: int):
        self.version = version
        self._inside = 0
        self._waiting = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._broken = ""

    @property
    def broken(self) -> bool:
        """Whether a change has failed, and none has succeeded since."""
        return bool(self._broken)

    @property
    def calls(self) -> int:
        """Calls inside now."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Calls that wait outside now."""
        return self._waiting

    async def enter(self, timeout_s: float) -> int:
        """Waits until no change is under way; returns the version that will answer.

        Raises InfrastructureError after `timeout_s` seconds, or when a change has failed. Every
        `enter` that returned is followed by `leave`.
        """
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                # Another change may begin between the event and our turn, so look again.
                while not self._open.is_set():
                    await self._open.wait()
        except TimeoutError as error:
            raise InfrastructureError(
                f"the weights were still changing after {timeout_s:g} s"
            ) from error
        finally:
            self._waiting -= 1
        if self._broken:
            raise InfrastructureError(self._broken)
        self._inside += 1
        self._idle.clear()
        return self.version

    def leave(self) -> None:
        """A call that was inside has ended. Never waits: it must work in a cancelled task too."""
        self._inside -= 1
        if self._inside == 0:
            self._idle.set()

    @asynccontextmanager
    async def change(
        self, version: int, timeout_s: float, drain: bool = True
    ) -> AsyncIterator[None]:
        """Closes the gate, and opens it as `version` after the body.

        To `drain` is to wait for the calls inside before the body begins.

        When the body raises, the weights may be half of one version and half of another: every
        call is refused until a later change succeeds. Raises InfrastructureError when calls are
        still inside after `timeout_s` seconds; the version then stays what it was.
        """
        if not self._open.is_set():
            raise InfrastructureError("another change of weights is under way")
        self._open.clear()
        try:
            try:
                if drain:
                    await asyncio.wait_for(self._idle.wait(), timeout_s)
            except TimeoutError as error:
                raise InfrastructureError(
                    f"{self._inside} calls were still being answered after {timeout_s:g} s, "
                    f"so version {version} could not be taken on"
                ) from error
            self._broken = f"the engine failed while taking on version {version}"
            yield
            self.version = version
            self._broken = ""
        finally:
            self._open.set()
