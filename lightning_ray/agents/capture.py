"""Reading what a process prints, without ever making it wait.

Invariant: a pipe is read until its end however much comes; only its first `limit` bytes are kept.
"""

import asyncio
import os

_CHUNK = 1 << 16


class Capture:
    """The reading end of one pipe, on the running event loop."""

    def __init__(self, limit: int) -> None:
        """Open a pipe and start reading it; `write_fd` belongs to the caller."""
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._kept = bytearray()
        self.truncated = False
        """Whether bytes were dropped."""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when every writer has closed its end."""
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._loop.add_reader(self._read_fd, self._read)

    @property
    def text(self) -> str:
        """What was kept, decoded as UTF-8 with undecodable bytes replaced."""
        return self._kept.decode("utf-8", "replace")

    @property
    def data(self) -> bytes:
        """What was kept."""
        return bytes(self._kept)

    def _read(self) -> None:
        try:
            chunk = os.read(self._read_fd, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            self.close()
            return
        room = self._limit - len(self._kept)
        self._kept += chunk[:room]
        self.truncated = self.truncated or len(chunk) > room

    def close(self) -> None:
        """Stop reading. Harmless when repeated."""
        if not self.ended.done():
            self._loop.remove_reader(self._read_fd)
            os.close(self._read_fd)
            self.ended.set_result(None)
