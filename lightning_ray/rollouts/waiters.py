"""Who waits for which rollouts to end. Belongs to one event loop, and knows no clock of ours."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass
class _Waiter:
    """Somebody who waits for so many more rollouts."""

    missing: int
    done: "asyncio.Future[None]"


class Waiters:
    """Waiting costs no polling: whoever ends a rollout says so."""

    def __init__(self, ended: Callable[[str], bool]):
        """`ended` says whether a rollout has; it raises KeyError for one that nobody knows."""
        self._ended = ended
        self._waiting: dict[str, list[_Waiter]] = {}

    async def wait(self, rollout_ids: Sequence[str], timeout_s: float, at_least: int) -> None:
        """Returns once `at_least` so many have ended, or after `timeout_s` seconds."""
        pending = {r for r in rollout_ids if not self._ended(r)}
        missing = at_least - (len(rollout_ids) - len(pending))
        if missing <= 0:
            return
        waiter = _Waiter(missing, asyncio.get_running_loop().create_future())
        for rollout_id in pending:
            self._waiting.setdefault(rollout_id, []).append(waiter)
        try:
            # Not an error: the caller sees from the records which are missing, and asks again.
            await asyncio.wait([waiter.done], timeout=timeout_s)
        finally:
            self._leave(waiter, pending)

    def notify(self, rollout_ids: Iterable[str]) -> None:
        """These may have ended."""
        for rollout_id in rollout_ids:
            if rollout_id in self._waiting and self._ended(rollout_id):
                for waiter in self._waiting.pop(rollout_id):
                    waiter.missing -= 1
                    if waiter.missing == 0 and not waiter.done.done():
                        waiter.done.set_result(None)

    def _leave(self, waiter: _Waiter, rollout_ids: Iterable[str]) -> None:
        for rollout_id in rollout_ids:
            if (waiters := self._waiting.get(rollout_id)) is not None:
                waiters[:] = [other for other in waiters if other is not waiter]
                if not waiters:
                    del self._waiting[rollout_id]
