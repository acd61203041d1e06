"""One segment: an append-only Arrow IPC stream on disk.

Invariant: a batch whose `append` returned is on the disk (fsync) and is read back by every later
`read_segment`, whatever happens to the process. Only the batch being written when a process died
may be missing; it is cut off at the tail and counted, never an error.
"""

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.schema import SPAN_SCHEMA

log = logging.getLogger(__name__)

SUFFIX = ".arrows"


@dataclass(frozen=True)
class BatchPlace:
    """Where one record batch lies: a segment's file, and a byte range in it."""

    path: Path
    offset: int
    length: int


class SegmentWriter:
    """Writes record batches of SPAN_SCHEMA to a new file; one thread at a time."""

    def __init__(self, path: Path):
        """Creates `path`, which must not exist, and makes its name durable.

        Raises OSError; no file is left behind then.
        """
        self.path = path
        self.size = 0
        """Bytes in the file."""
        # Unbuffered, so that nothing of a failed append is left to be written later.
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (kept open)
        try:
            self._write(SPAN_SCHEMA.serialize())
            _sync_folder(path.parent)
        except OSError:
            self._file.close()
            path.unlink(missing_ok=True)
            raise

    @property
    def closed(self) -> bool:
        """Whether it takes no more batches: it was closed, or could not be cut back."""
        return self._file.closed

    def append(self, batch: pa.RecordBatch) -> BatchPlace:
        """Writes one batch and waits for the disk. Raises OSError (a full disk, say).

        After an error the file is cut back to where it was, so that the next append finds a clean
        tail; if even that fails the writer refuses further appends.
        """
        if self.closed:
            raise OSError(errno.EBADF, "the segment is closed")
        start = self.size
        try:
            self._write(batch.serialize())
        except OSError:
            self._cut(start)
            raise
        return BatchPlace(self.path, start, self.size - start)

    def close(self) -> None:
        """Ends the stream; the segment is complete."""
        self._file.close()

    def _write(self, buffer: pa.Buffer) -> None:
        rest = memoryview(buffer)
        while rest:
            # A write may take less than all, on a disk that is filling up.
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
        self.size += buffer.size

    def _cut(self, size: int) -> None:
        try:
            self._file.truncate(size)
            self._file.seek(size)
        except OSError:
            self._file.close()
            raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class SegmentScan:
    """What `read_segment` found."""

    batches: list[tuple[BatchPlace, pa.RecordBatch]]
    lost_bytes: int
    """Bytes of a torn last batch, left unread; 0 for a clean segment."""


def read_segment(path: Path) -> SegmentScan:
    """Reads a segment through a memory map: the batches' buffers are the file's own pages.

    Raises InfrastructureError when the file does not begin with the span schema.
    """
    size = path.stat().st_size
    if size == 0:
        return SegmentScan([], 0)
    with pa.memory_map(str(path)) as source:
        try:
            foreign = not pa.ipc.read_schema(source).equals(SPAN_SCHEMA)
        except (pa.ArrowInvalid, EOFError, OSError) as error:
            log.warning("segment %s: %s", path, error)
            foreign = True
        if foreign and size <= SPAN_SCHEMA.serialize().size:
            # Its writer died while creating it: there is no room for a batch in it.
            return SegmentScan([], size)
        if foreign:
            raise InfrastructureError(f"{path} does not begin with this version's span schema")
        batches = []
        end = source.tell()
        for place, batch in _batches(path, source, size):
            batches.append((place, batch))
            end = place.offset + place.length
    if end < size:
        log.warning("segment %s: %d bytes of a torn last batch are left out", path, size - end)
    return SegmentScan(batches, size - end)


def _batches(
    path: Path, source: pa.NativeFile, size: int
) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
    while (start := source.tell()) < size:
        try:
            message = pa.ipc.read_message(source)
            batch = pa.ipc.read_record_batch(message, SPAN_SCHEMA)
            # A body that was cut, and the file extended with zeros, parses; its offsets are wrong.
            batch.validate(full=True)
        except (pa.ArrowInvalid, EOFError, OSError):
            return
        yield BatchPlace(path, start, source.tell() - start), batch


def read_batch(place: BatchPlace) -> pa.RecordBatch:
    """One batch, from where `append` or `read_segment` said it lies."""
    with pa.memory_map(str(place.path)) as source:
        source.seek(place.offset)
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), SPAN_SCHEMA)
