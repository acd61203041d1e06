"""The journal of a queue: every event of its lifecycle, on disk.

Invariant: what `durable` has returned for is read back by every later `Journal`, whatever happens
to the process. Each line carries a checksum. What a dying process left half written at the end is
cut off and counted; damage before the end is an error, never skipped.
"""

import asyncio
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts.lives import Event
from lightning_ray.rollouts.wire import decode, encode
from lightning_ray.spans.durable import sync_folder

NAME = "journal.log"
COMPACT_BYTES = 64 * 1024 * 1024
"""A journal that has grown so much since its snapshot is written anew."""


class Journal:
    """The file of one queue; belongs to one event loop."""

    def __init__(self, folder: Path):
        """Reads what is there into `events`. Raises InfrastructureError for what cannot be."""
        self._path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.events, whole, self.torn = read_journal(self._path)
            """`events` of before, oldest first; `torn` bytes were cut off behind them."""
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
            sync_folder(folder)
        except OSError as error:
            raise InfrastructureError(f"{self._path}: {error.strerror}") from error
        self._since_snapshot = whole
        self._waiting: list[bytes] = []
        self._written: asyncio.Future[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._broken: OSError | None = None

    def add(self, events: Sequence[Event]) -> None:
        """Takes events that are to be written with the next call of `durable`."""
        self._waiting += map(_line, events)

    async def durable(self) -> None:
        """Returns once all that was added is on the disk; concurrent callers share one fsync.

        Raises InfrastructureError once the disk has refused: the memory is then ahead of it.
        """
        if self._broken is None and (self._waiting or self._written is not None):
            if self._written is None or self._waiting:
                await self._shared()
            else:
                await asyncio.shield(self._written)
        if self._broken is not None:
            raise InfrastructureError(f"{self._path}: {self._broken.strerror}") from self._broken

    async def _shared(self) -> None:
        # Those who come while a write is under way are written together by the next one.
        while self._written is not None and self._waiting:
            await asyncio.shield(self._written)
            if self._broken is not None:
                return
        if self._waiting:
            self._written = asyncio.get_running_loop().create_future()
            self._writing = asyncio.create_task(self._write(b"".join(self._waiting)))
            self._waiting.clear()
        if self._written is not None:
            await asyncio.shield(self._written)

    async def _write(self, lines: bytes) -> None:
        try:
            await asyncio.to_thread(self._append, lines)
        except OSError as error:
            self._broken = error
        finally:
            written, self._written = self._written, None
            if written is not None:
                written.set_result(None)

    def _append(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        os.fsync(self._file)
        self._since_snapshot += len(lines)

    @property
    def broken(self) -> bool:
        """Whether the disk has refused: nothing more is written, and the memory is ahead of it."""
        return self._broken is not None

    @property
    def large(self) -> bool:
        """Whether it is time for `compact`."""
        return self._since_snapshot > COMPACT_BYTES and self._written is None

    def compact(self, snapshot: Sequence[Event]) -> None:
        """Puts a snapshot in the place of all that was written. Raises InfrastructureError."""
        new = self._path.with_suffix(".new")
        try:
            file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            lines = memoryview(b"".join(map(_line, snapshot)))
            while lines:
                lines = lines[os.write(file, lines) :]
            os.fsync(file)
            os.replace(new, self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise InfrastructureError(f"{new}: {error.strerror}") from error
        os.close(self._file)
        self._file, self._since_snapshot = file, 0
        # The snapshot holds what had not been written yet.
        self._waiting.clear()


def read_journal(path: Path) -> tuple[list[Event], int, int]:
    """The events of a journal, the bytes of its whole lines, and the torn ones behind them.

    Raises InfrastructureError for a damaged line before the end, OSError for an unreadable file.
    """
    content = path.read_bytes() if path.exists() else b""
    events: list[Event] = []
    lines = content.split(b"\n")
    whole = 0
    for number, line in enumerate(lines[:-1], start=1):
        if not _sound(line):
            if any(map(_sound, lines[number:-1])):
                raise InfrastructureError(
                    f"{path}:{number}: damaged; the lines behind it are whole, so this is no torn "
                    "end. Restore the file, or move it away to go on without its rollouts"
                )
            break
        events.append(decode(line[9:]))
        whole += len(line) + 1
    return events, whole, len(content) - whole


def _line(event: Event) -> bytes:
    body = encode(event)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _sound(line: bytes) -> bool:
    return line[:9] == b"%08x " % zlib.crc32(line[9:])
