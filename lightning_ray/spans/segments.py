"""The segments of one shard: a folder of numbered files, the last of which is being written.

Invariant: a row's place (`segment << 32 | row`) is the same for as long as the segment exists, in
this process and after a restart. What is in the ledger of a closed segment is all that was
acknowledged of it: a file that is shorter has been cut by somebody else, and that is counted.
"""

import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.durable import sync_folder, write_durably
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.segment import (
    SUFFIX,
    BatchPlace,
    SegmentWriter,
    mend_segment,
    read_batches,
    read_segment,
)

log = logging.getLogger(__name__)

LEDGER = ".ledger.json"

Places = npt.NDArray[np.int64]


@dataclass
class Segment:
    """What is known of one file."""

    number: int
    path: Path
    offsets: list[int] = field(default_factory=list)
    """Where its batches begin, bytes."""
    first_rows: list[int] = field(default_factory=list)
    """The number of each batch's first row."""
    rows: int = 0
    size: int = 0
    """Bytes in the file."""

    def add(self, place: BatchPlace, rows: int) -> int:
        """Takes note of a batch; returns the place of its first row."""
        first = self.number << 32 | self.rows
        self.offsets.append(place.offset)
        self.first_rows.append(self.rows)
        self.rows += rows
        return first


@dataclass
class Damage:
    """What recovery found wrong, in bytes."""

    lost_bytes: int = 0
    """Torn batches, and nobody was ever told that they were stored."""
    damaged_bytes: int = 0
    """Batches that changed on disk beyond mending. Their spans are gone."""
    missing_bytes: int = 0
    """What a closed segment had and has no more. Its spans are gone."""
    mended_bytes: int = 0
    """Changed bytes that were put right."""


class Segments:
    """The files of one shard; one thread at a time may append."""

    def __init__(self, folder: Path, segment_bytes: int):
        """Makes the folder; `recover` reads what is in it. Raises InfrastructureError."""
        self._folder = folder
        self._segment_bytes = segment_bytes
        self.known: dict[int, Segment] = {}
        """Every segment whose file is here, by number."""
        self.damage = Damage()
        self._writer: SegmentWriter | None = None
        self._last = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InfrastructureError(f"{folder}: {error.strerror or error}") from error

    def recover(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Reads every segment, oldest first: the place of a batch's first row, and the batch.

        Raises InfrastructureError for a file that is no segment, or cannot be read.
        """
        for path in sorted(self._folder.glob("*" + SUFFIX)):
            segment = Segment(int(path.stem), path)
            try:
                scan = read_segment(path)
                if scan.mended:
                    mend_segment(path, scan.mended)
                segment.size = path.stat().st_size
            except OSError as error:
                raise InfrastructureError(f"{path}: {error.strerror or error}") from error
            self.known[segment.number] = segment
            self._last = max(self._last, segment.number)
            for place, batch in scan.batches:
                yield segment.add(place, batch.num_rows), batch
            self._note_damage(segment, scan.lost_bytes, scan.damaged, len(scan.mended))

    def reserve(self, number: int) -> None:
        """Numbers up to this one are taken, though their files are gone."""
        self._last = max(self._last, number)

    def append(self, batch: pa.RecordBatch) -> int:
        """Writes a batch of SPAN_SCHEMA and waits for the disk; the place of its first row.

        Raises OSError; nothing of the batch is stored then.
        """
        writer = self._writer
        if writer is None or writer.closed or writer.size > self._segment_bytes:
            # Made first: on a disk that has no room for it, the old one stays in use.
            successor = self._create()
            self.close()
            self._writer = writer = successor
        segment = self.known[self._last]
        place = writer.append(batch)
        segment.size = writer.size
        return segment.add(place, batch.num_rows)

    @property
    def open_number(self) -> int | None:
        """The number of the segment that is being written."""
        return None if self._writer is None or self._writer.closed else self._last

    def close(self) -> None:
        """Ends the open segment; the next append begins another."""
        if self._writer is None:
            return
        self._writer.close()
        segment = self.known[int(self._writer.path.stem)]
        self._writer = None
        try:
            self._write_ledger(segment)
        except OSError as error:
            # Written by the next recovery; until then a cut of this file would not be noticed.
            log.warning("segment %s: its ledger could not be written: %s", segment.path, error)

    def forget(self, number: int) -> int:
        """Deletes a closed segment's file, whose spans are kept elsewhere; returns its bytes.

        Raises OSError.
        """
        segment = self.known.pop(number)
        segment.path.unlink(missing_ok=True)
        self._ledger_of(segment).unlink(missing_ok=True)
        sync_folder(self._folder)
        return segment.size

    def rows(self, number: int, rows: Places) -> list[pa.RecordBatch]:
        """These rows of a segment, in order, as slices of its pages. Raises OSError."""
        segment = self.known[number]
        batches = self._open(segment, rows)
        pieces = []
        start = 0
        while start < len(rows):
            at = bisect_right(segment.first_rows, int(rows[start])) - 1
            first = segment.first_rows[at]
            limit = first + batches[at].num_rows
            end = start + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1 and rows[end] < limit:
                end += 1
            pieces.append(batches[at].slice(int(rows[start]) - first, end - start))
            start = end
        return pieces

    def table(
        self, number: int, first_row: int = 0, columns: Sequence[str] = SPAN_SCHEMA.names
    ) -> pa.Table:
        """A whole segment from a row on; its buffers are the file's pages. Raises OSError."""
        segment = self.known[number]
        batches = read_batches(segment.path, segment.offsets[: len(segment.first_rows)])
        return pa.Table.from_batches(batches, SPAN_SCHEMA).select(list(columns)).slice(first_row)

    def _open(self, segment: Segment, rows: Places) -> dict[int, pa.RecordBatch]:
        wanted = np.unique(np.searchsorted(segment.first_rows, rows, "right") - 1).tolist()
        found = read_batches(segment.path, [segment.offsets[at] for at in wanted])
        return dict(zip(wanted, found, strict=True))

    def _create(self) -> SegmentWriter:
        # Always a new file: a torn tail of the last process stays as it is, for whoever asks.
        number = self._last + 1
        writer = SegmentWriter(self._folder / f"{number:08d}{SUFFIX}")
        self._last = number
        self.known[number] = Segment(number, writer.path, size=writer.size)
        return writer

    def _note_damage(
        self, segment: Segment, lost: int, damaged: list[tuple[int, int]], mended: int
    ) -> None:
        whole = segment.size - lost
        self.damage.lost_bytes += lost
        self.damage.damaged_bytes += sum(length for _, length in damaged)
        self.damage.mended_bytes += mended
        ledger = self._ledger_of(segment)
        if not ledger.exists():
            # Its writer died; what is whole now is what there is.
            self._write_ledger(segment, whole)
            return
        try:
            expected = int(json.loads(ledger.read_text())["bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InfrastructureError(f"{ledger} cannot be read: {error}; delete it") from error
        if whole < expected:
            missing = expected - whole
            self.damage.missing_bytes += missing
            log.error(
                "segment %s: %d bytes that were written are missing; something cut the file, and "
                "the spans in them are lost",
                segment.path,
                missing,
            )

    def _ledger_of(self, segment: Segment) -> Path:
        return self._folder / f"{segment.number:08d}{LEDGER}"

    def _write_ledger(self, segment: Segment, size: int | None = None) -> None:
        said = {"bytes": segment.size if size is None else size, "rows": segment.rows}
        write_durably(self._ledger_of(segment), json.dumps(said).encode())
