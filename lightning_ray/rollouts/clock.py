"""The one clock of a queue."""

import time
from collections.abc import Callable


class Clock:
    """Wall seconds that never go back, whatever is done to the machine's clock."""

    def __init__(self, read: Callable[[], float] = time.time, since: float = float("-inf")):
        """`since` is a time that has been told already: no earlier one follows."""
        self._read = read
        self._last = since

    def now(self) -> float:
        """Seconds since the epoch, at least as many as the last time."""
        self._last = max(self._last, self._read())
        return self._last
