"""Sealing a shard's segments: closed ones go into the archive, and their files are given up later.

Invariant: a segment's own file is deleted only when its manifest is on the disk, so at every moment
each acknowledged span is in a segment, in the archive, or in both.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.archive import KEYS, Archive, Numbers, Sealed, read_manifests
from lightning_ray.spans.segments import Segments

log = logging.getLogger(__name__)


class SealedSegments:
    """What of a shard is in the archive; one thread at a time may seal."""

    def __init__(self, folder: Path, shard: int, segments: Segments, archive: Archive):
        """Reads the manifests in the shard's folder. Raises InfrastructureError."""
        self._folder = folder
        self._shard = shard
        self._segments = segments
        self._archive = archive
        self.known = {sealed.segment: sealed for sealed in read_manifests(folder)}
        """What is sealed, by segment."""
        segments.reserve(max(self.known, default=0))

    def only(self) -> list[int]:
        """The segments that are in the archive alone."""
        return sorted(set(self.known) - set(self._segments.known))

    def waiting(self) -> list[int]:
        """The closed segments that are not sealed yet."""
        closed = set(self._segments.known) - {self._segments.open_number}
        return sorted(closed - set(self.known))

    def seal(self, number: int) -> Sealed:
        """Seals a closed segment. Raises OSError, and another try may follow."""
        keys = self._segments.table(number, columns=KEYS)

        def rows(numbers: Numbers) -> list[pa.RecordBatch]:
            return self._segments.rows(number, numbers)

        sealed = self._archive.seal(keys, rows, self._shard, number)
        sealed.write_manifest(self._folder)
        self.known[number] = sealed
        log.info("segment %d of %s: %d spans sealed", number, self._folder, sealed.rows)
        return sealed

    def give_up(self, keep_bytes: int) -> list[int]:
        """Deletes the files of the oldest sealed segments until the rest is at most `keep_bytes`.

        Returns which. Raises OSError.
        """
        held = sum(segment.size for segment in self._segments.known.values())
        gone = []
        for number in sorted(set(self.known) & set(self._segments.known)):
            if held <= keep_bytes:
                break
            held -= self._segments.forget(number)
            gone.append(number)
        return gone

    def read(
        self, number: int, where: pc.Expression | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows of a segment from the archive. Raises InfrastructureError."""
        return self._archive.read(self.known[number].files, where, columns)
