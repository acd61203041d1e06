"""One segment: an append-only Arrow IPC stream on disk.

Invariant: a batch whose `append` returned is on the disk (fsync) and is read back by every later
`read_segment`, whatever happens to the process. Only the batch being written when a process died
may be missing; it is cut off at the tail and counted, never an error. Each batch carries check
digits: one changed byte is put right, and larger damage costs its own batch and no other; both are
counted.
"""

import errno
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans import checksum
from lightning_ray.spans.durable import sync_folder
from lightning_ray.spans.schema import SPAN_SCHEMA, check_written_by, conform

log = logging.getLogger(__name__)

SUFFIX = ".arrows"

_HEADER = SPAN_SCHEMA.serialize()
_CONTINUATION = b"\xff\xff\xff\xff"
"""Every IPC message begins with it, at a multiple of `_ALIGNMENT` bytes (Arrow's IPC format)."""
_ALIGNMENT = 8
_UNREADABLE = (pa.ArrowException, ValueError, EOFError, OSError)
"""What Arrow raises for bytes that are no message: names that are no UTF-8 are a ValueError."""


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
            self._write(memoryview(_HEADER).cast("B"))
            sync_folder(path.parent)
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
            self._write(*_message(batch))
        except OSError:
            self._cut(start)
            raise
        return BatchPlace(self.path, start, self.size - start)

    def close(self) -> None:
        """Ends the stream; the segment is complete."""
        self._file.close()

    def _write(self, *parts: memoryview) -> None:
        for part in parts:
            rest = part
            while rest:
                # A write may take less than all, on a disk that is filling up.
                rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
        self.size += sum(len(part) for part in parts)

    def _cut(self, size: int) -> None:
        try:
            self._file.truncate(size)
            self._file.seek(size)
        except OSError:
            self._file.close()
            raise


def _message(batch: pa.RecordBatch) -> tuple[memoryview, memoryview, memoryview]:
    """The batch as an IPC message: what stands before its check digits, they, and the rest."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SPAN_SCHEMA) as writer:
        writer.write_batch(batch, custom_metadata=checksum.PLACEHOLDER)
        end = sink.tell()
    # The header goes before the first batch; the file has it already.
    message = memoryview(sink.getvalue()).cast("B")[_HEADER.size : end]
    place, digits = checksum.seal(message)
    return message[:place], memoryview(digits), message[place + len(digits) :]


@dataclass
class SegmentScan:
    """What `read_segment` found."""

    batches: list[tuple[BatchPlace, pa.RecordBatch]] = field(default_factory=list)
    lost_bytes: int = 0
    """Bytes of a torn last batch, left unread; 0 for a clean segment."""
    damaged: list[tuple[int, int]] = field(default_factory=list)
    """Byte ranges (offset, length) that could not be read, with batches behind them."""
    mended: list[tuple[int, int]] = field(default_factory=list)
    """Bytes that were put right in what was read (offset, value); `mend_segment` writes them."""


def read_segment(path: Path) -> SegmentScan:
    """Reads a segment through a memory map: the batches' buffers are the file's own pages.

    Batches of an older schema version are given in this one. Raises InfrastructureError when the
    file does not begin with a span schema that can be read.
    """
    scan = SegmentScan()
    size = path.stat().st_size
    if size == 0:
        return scan
    with pa.memory_map(str(path)) as source:
        file = memoryview(source.read_buffer(size)).cast("B")
    header = _read_header(path, file, scan)
    if header is None:
        scan.lost_bytes = size
        return scan
    schema, offset = header
    while offset < size:
        batch, end = _read_message(file, offset, schema)
        if batch is None:
            end = _next_message(file, offset, schema)
            batch = _mended(file, offset, end, schema, scan)
        if batch is not None:
            scan.batches.append((BatchPlace(path, offset, end - offset), batch))
        elif end == size:
            scan.lost_bytes = size - offset
            log.warning(
                "segment %s: %d bytes of a torn last batch are left out", path, end - offset
            )
        else:
            scan.damaged.append((offset, end - offset))
            log.error(
                "segment %s: %d bytes from byte %d on are damaged, and the spans in them lost; the "
                "disk should be looked at",
                path,
                end - offset,
                offset,
            )
        offset = end
    return scan


def mend_segment(path: Path, mended: list[tuple[int, int]]) -> None:
    """Writes what `read_segment` put right into the file. Raises OSError."""
    with open(path, "r+b", buffering=0) as file:
        for offset, value in mended:
            os.pwrite(file.fileno(), bytes([value]), offset)
        os.fsync(file.fileno())
    log.warning("segment %s: %d changed bytes were put right", path, len(mended))


def read_batches(path: Path, offsets: list[int]) -> list[pa.RecordBatch]:
    """Batches that begin at these bytes of a segment, as `append` or `read_segment` said.

    Their buffers are the file's own pages. They are not checked again. Raises OSError.
    """
    with pa.memory_map(str(path)) as source:
        schema = pa.ipc.read_schema(source)
        batches = []
        for offset in offsets:
            source.seek(offset)
            batches.append(conform(pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)))
        return batches


def _read_header(path: Path, file: memoryview, scan: SegmentScan) -> tuple[pa.Schema, int] | None:
    """The schema and where the batches begin; None when the writer died while creating the file."""
    own = bytes(_HEADER)
    if len(file) >= len(own):
        # A version is told from another by more than one byte: by the columns that it added.
        wrong = [place for place, value in enumerate(own) if file[place] != value]
        if len(wrong) <= 1:
            scan.mended += [(place, own[place]) for place in wrong]
            return SPAN_SCHEMA, len(own)
    try:
        with pa.BufferReader(file) as source:
            schema = pa.ipc.read_schema(source)
            check_written_by(schema, str(path))
            return schema, source.tell()
    except (*_UNREADABLE, InfrastructureError) as error:
        if len(file) <= len(own):
            return None
        if isinstance(error, InfrastructureError):
            raise
        raise InfrastructureError(f"{path} does not begin with a span schema: {error}") from error


def _read_message(
    file: memoryview, offset: int, schema: pa.Schema
) -> tuple[pa.RecordBatch | None, int]:
    """The batch at `offset` and where it ends; None when there is none that is whole."""
    try:
        with pa.BufferReader(file[offset:]) as source:
            message = pa.ipc.read_message(source)
            end = offset + source.tell()
            good = checksum.verify(file[offset:end])
            if good is False:
                return None, offset
            batch = pa.ipc.read_record_batch(message, schema)
            if good is None:
                # Version 1 had no check digits. A body that was cut, and the file extended with
                # zeros, parses; its offsets are wrong.
                batch.validate(full=True)
            return conform(batch), end
    except _UNREADABLE:
        return None, offset


def _next_message(file: memoryview, offset: int, schema: pa.Schema) -> int:
    """Where the next whole message behind `offset` begins; the file's end when there is none."""
    raw = bytes(file[offset:])
    found = _ALIGNMENT - 1
    while (found := raw.find(_CONTINUATION, found + 1)) >= 0:
        if (offset + found) % _ALIGNMENT:
            continue
        if _read_message(file, offset + found, schema)[0] is not None:
            return offset + found
    return len(file)


def _mended(
    file: memoryview, offset: int, end: int, schema: pa.Schema, scan: SegmentScan
) -> pa.RecordBatch | None:
    """The batch between two bytes with its one wrong byte put right, if that is all it needs."""
    change = checksum.mend(file[offset:end])
    if change is None:
        return None
    place, value = change
    copy = bytearray(file[offset:end])
    copy[place] = value
    batch, length = _read_message(memoryview(bytes(copy)), 0, schema)
    if batch is None or length != end - offset:
        return None
    scan.mended.append((offset + place, value))
    return batch
