"""How many calls there may be at a time: of one attempt or key, and of all."""

from collections import Counter
from collections.abc import Callable


class TooManyCallsError(Exception):
    """One call more than may be at a time; the message says which setting says so."""


class CallLimits:
    """Counts the calls inside one replica; belongs to one event loop."""

    def __init__(self, in_all: int):
        self._in_all = in_all
        self._inside: Counter[str] = Counter()
        self._all = 0

    def enter(self, who: str, limit: int, setting: str) -> Callable[[], None]:
        """Counts a call of `who`, until what is returned is called; more often is harmless.

        Raises TooManyCallsError when there are `limit` of `who`, as `setting` says, or as many as
        there may be of all.
        """
        if self._inside[who] >= limit:
            raise TooManyCallsError(f"more than {limit} calls at a time ({setting}); try again")
        if self._all >= self._in_all:
            raise TooManyCallsError(
                f"more than {self._in_all} calls of all at a time (gateway.max_calls); try again"
            )
        self._inside[who] += 1
        self._all += 1
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._all -= 1
                self._inside[who] -= 1
                if self._inside[who] == 0:
                    del self._inside[who]

        return leave
