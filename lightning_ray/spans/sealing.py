"""Sealing a shard's segments: closed ones go into the archive, and their files are given up later.

Invariant: a segment's own file is deleted only when its manifest is on the disk, so at every moment
each acknowledged span is in a segment, in the archive, or in both, until it is removed; and what is
removed is on record before that (`retention`).
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans.archive import KEYS, Archive, Numbers
from lightning_ray.spans.config import SpansConfig
from lightning_ray.spans.manifests import Sealed, SealedFile, read_manifests
from lightning_ray.spans.retention import (
    Removal,
    finish_removals,
    gone_files,
    plan_removals,
    read_removed,
    remove,
)
from lightning_ray.spans.segments import Segments

log = logging.getLogger(__name__)

REMOVE_TIMEOUT_S = 30.0
"""How long another process that removes from the same folder is waited for, seconds."""


class SealedSegments:
    """What of a shard is in the archive; one thread at a time may seal or remove."""

    def __init__(self, folder: Path, shard: int, segments: Segments, config: SpansConfig):
        """Reads the manifests in the folder of spans, and finishes removals that were cut short.

        Raises InfrastructureError.
        """
        self._folder = folder
        self._shard = shard
        self._segments = segments
        self._config = config
        self._archive = Archive(config.archive, folder)
        finish_removals(folder)
        self.known = {s.segment: s for s in read_manifests(folder) if s.shard == shard}
        """What is sealed, by segment."""
        self.gone = gone_files(read_removed(folder))
        """(archive, path) of files that were removed."""
        segments.reserve(max(self.known, default=0))

    def only(self) -> list[int]:
        """The segments that are in the archive alone."""
        return sorted(set(self.known) - set(self._segments.known))

    def waiting(self) -> list[int]:
        """The closed segments that are not sealed yet."""
        closed = set(self._segments.known) - {self._segments.open_number}
        return sorted(closed - set(self.known))

    def seal(self, number: int) -> Sealed:
        """Seals a closed segment. Raises OSError or InfrastructureError; another try may follow."""

        def rows(numbers: Numbers) -> list[pa.RecordBatch]:
            return self._segments.rows(number, numbers)

        # Not kept here: it holds the segment's pages, and is needed at the beginning only.
        sealed = self._archive.seal(
            self._segments.table(number, columns=KEYS), rows, self._shard, number
        )
        sealed.write_manifest(self._folder)
        self.known[number] = sealed
        log.info("segment %d of %s: %d spans sealed", number, self._folder, sealed.rows)
        return sealed

    def give_up(self) -> None:
        """Deletes the oldest sealed segments' files beyond `keep_local_bytes`. Raises OSError."""
        held = sum(segment.size for segment in self._segments.known.values())
        for number in sorted(set(self.known) & set(self._segments.known)):
            if held <= self._config.keep_local_bytes:
                break
            held -= self._segments.forget(number)

    def retain(self, now_ns: int, run_id: str | None = None) -> int:
        """Removes what the limits say, and this run's spans; how many spans went.

        Raises OSError or InfrastructureError; what is on record already is finished later.
        """
        plans = plan_removals(
            list(self.known.values()),
            self.gone,
            now_ns=now_ns,
            keep_days=self._config.keep_days,
            keep_bytes=self._config.keep_bytes,
            run_id=run_id,
        )
        return sum(self._remove(plan, now_ns) for plan in plans)

    def _remove(self, plan: Removal, now_ns: int) -> int:
        going = {(plan.archive, path) for path in plan.paths}
        for number, sealed in self.known.items():
            if number in self._segments.known and any(
                (sealed.archive, file.path) in going for file in sealed.files
            ):
                # What stays of it is in the archive.
                self._segments.forget(number)
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        while True:
            try:
                remove(self._folder, plan, now_ns)
                break
            except UserError as error:
                # The other shards of this store remove too, one at a time.
                if time.monotonic() > deadline:
                    raise InfrastructureError(str(error)) from error
                time.sleep(0.05)
        self.gone |= going
        return plan.rows

    def read(
        self, number: int, where: pc.Expression | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows of a segment from the archive. Raises InfrastructureError."""
        sealed = self.known[number]
        archive = self._archive
        if sealed.archive != archive.uri:
            archive = Archive(sealed.archive, self._folder)
        named = None if columns is None else list(columns)
        try:
            return archive.dataset(self._left(sealed)).to_table(columns=named, filter=where)
        except (OSError, pa.ArrowException) as error:
            raise InfrastructureError(f"sealed spans in {archive.place}: {error}") from error

    @property
    def removed(self) -> int:
        """Spans of this shard that were removed."""
        return sum(
            file.rows
            for sealed in list(self.known.values())
            for file in sealed.files
            if (sealed.archive, file.path) in self.gone
        )

    def _left(self, sealed: Sealed) -> list[SealedFile]:
        return [file for file in sealed.files if (sealed.archive, file.path) not in self.gone]
