"""Which attempts run now, in memory that the queue shares with the doors on its node.

A door that asks the queue with a message waits for about as long as all else takes that it does
with a call, and keeps both busy. Here it looks.

Invariant: an attempt has its seat from before its worker hears of it until its end is decided,
which is before anybody hears of the end. A seat that is not whole says no, and the queue is asked.
A queue that is down leaves the roster as it was; one that restarts begins with an empty one.
"""

import logging
import mmap
import os
from pathlib import Path

log = logging.getLogger(__name__)

SEATS = 65_536
"""Attempts at a time; of more than that the queue is asked."""
WIDTH = 16
"""Bytes of a capability's digest in its seat: too many to be met by chance."""
SIZE = SEATS * WIDTH
NOWHERE = -1
"""The seat of an attempt that has none."""

_EMPTY = bytes(WIDTH)


class Roster:
    """The queue's side: it alone writes."""

    def __init__(self, path: Path):
        """Raises OSError when the file cannot be made, or the disk has no room for it."""
        # The file stays the same one when the queue restarts: doors look at it already.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Room is taken now: writing where the disk has none would end the process.
            os.posix_fallocate(descriptor, 0, SIZE)
            self._seats = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        self._seats[:] = bytes(SIZE)
        self.path = path
        self._free: list[int] = []
        self._used = 0

    def take(self, digest: bytes) -> int:
        """Gives an attempt a seat; `NOWHERE` when all are taken. `digest` is its capability's."""
        if self._free:
            seat = self._free.pop()
        elif self._used < SEATS:
            seat, self._used = self._used, self._used + 1
        else:
            return NOWHERE
        self._seats[seat * WIDTH : (seat + 1) * WIDTH] = digest[:WIDTH]
        return seat

    def leave(self, seat: int) -> None:
        """An attempt is over."""
        if seat != NOWHERE:
            self._seats[seat * WIDTH : (seat + 1) * WIDTH] = _EMPTY
            self._free.append(seat)


def make_roster(path: Path) -> Roster | None:
    """A roster, or None where there can be none; then doors ask."""
    try:
        return Roster(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        log.warning("no roster of attempts at %s (%s): doors ask the queue", path, error)
        return None


class RosterReader:
    """A door's side, on the queue's node."""

    def __init__(self, path: Path):
        """Raises OSError or ValueError when there is no roster."""
        self._file = path.open("rb")
        self._seats = mmap.mmap(self._file.fileno(), SIZE, access=mmap.ACCESS_READ)

    def sits(self, seat: int, digest: bytes) -> bool:
        """Whether the attempt runs that was given a seat; a no may be late or mean nothing."""
        # One that was removed is no longer written: a queue that restarted has another, or none.
        if not 0 <= seat < SEATS or os.fstat(self._file.fileno()).st_nlink == 0:
            return False
        return self._seats[seat * WIDTH : (seat + 1) * WIDTH] == digest[:WIDTH]
