"""Who may come in: the attempt that a capability stands for, as the queue says at this moment.

Of an attempt that it knows, the door sees in the queue's roster whether it runs, where it shares a
node with the queue. Elsewhere it asks, which takes about as long as all else that it does with a
call: so a call of an attempt that was running a moment ago goes on to the engine meanwhile.

Invariant: no byte of a reply leaves the door before the queue, or its roster, said that the attempt
runs, asked after the call came. Where it says no, the engine's work is cancelled.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response

from lightning_ray.rollouts import Identity, Line, RosterReader
from lightning_ray.rollouts.capabilities import digest

KNOWN_S = 30.0
"""How long after the queue's last yes a call may go ahead of its next one, seconds."""
MOST = 16_384
"""Attempts that are remembered."""


class NotAdmittedError(Exception):
    """The capability stands for no running attempt."""


class Admission:
    """One call's question to the queue; `expected` is what it said last, if that was lately."""

    def __init__(
        self,
        asked: "asyncio.Future[Identity | None]",
        expected: Identity | None,
        seen: bool = False,
    ):
        """`seen`: the roster has said yes already."""
        self._asked = asked
        self._seen = seen
        self.expected = expected

    async def identity(self) -> Identity:
        """What the queue says. Raises NotAdmittedError, and what `Line.resolve` raises."""
        identity = await self._asked
        if identity is None or self.expected not in (None, identity):
            raise NotAdmittedError
        return identity

    async def meanwhile(self, answer: Coroutine[Any, Any, Response]) -> Response:
        """The answer, which is begun at once, after the queue has said yes. Raises as `identity`.

        What an answer holds open is let go by its visit.
        """
        if self._seen:
            return await answer
        answering = asyncio.create_task(answer)
        both: set[asyncio.Future[Any]] = {answering, self._asked}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            await self.identity()
            return await answering
        finally:
            # Its error, if it has one, matters to nobody when the call was not let in.
            if not answering.cancel() and not answering.cancelled():
                answering.exception()


class Attempts:
    """What one replica of the door asks of the queue; belongs to one event loop."""

    def __init__(self, line: Line):
        self._line = line
        self._known: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self._roster: RosterReader | None = None

    def look_at(self, roster: RosterReader | None) -> None:
        """Where it is seen who runs."""
        self._roster = roster

    def ask(self, capability: str) -> Admission:
        """Asks whose it is; the answer is awaited later."""
        known = self._known.get(capability)
        if known and self._roster and self._roster.sits(known[0].seat, digest(capability)):
            seen: asyncio.Future[Identity | None] = asyncio.get_running_loop().create_future()
            seen.set_result(known[0])
            self._learn(capability, seen)
            return Admission(seen, known[0], seen=True)
        expected = known[0] if known and time.monotonic() - known[1] < KNOWN_S else None
        asked = self._line.resolve(capability)
        asked.add_done_callback(lambda answer: self._learn(capability, answer))
        return Admission(asked, expected)

    def _learn(self, capability: str, answer: "asyncio.Future[Identity | None]") -> None:
        if answer.cancelled() or answer.exception() is not None:
            return
        identity = answer.result()
        if identity is None:
            self._known.pop(capability, None)
            return
        self._known[capability] = identity, time.monotonic()
        self._known.move_to_end(capability)
        # The oldest come first. They hold their attempts' prompts, and say nothing any more.
        while len(self._known) > MOST or self._oldest() > KNOWN_S:
            self._known.popitem(last=False)

    def _oldest(self) -> float:
        """How long ago the first of them was let in, seconds."""
        return time.monotonic() - next(iter(self._known.values()))[1]
