"""Reading a shard: the rows of a rollout, from its segments or from the archive.

Invariant: rows come from wherever their segment is at that moment; one that is given up between
the index's answer and the reading is found in the archive.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.index import split_places
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.sealing import SealedSegments
from lightning_ray.spans.segments import Segments

PART_ROWS = 1 << 16
"""Rows that one part of a scan looks at."""

Part = tuple[int, int]
"""A piece of a segment: its number, and the first row."""


class ShardReader:
    """Reads rows; any number of threads at a time."""

    def __init__(self, segments: Segments, sealed: SealedSegments):
        self._segments = segments
        self._sealed = sealed

    def find(
        self,
        places: Sequence[int],
        column: str,
        wanted: Sequence[str],
        columns: Sequence[str] | None = None,
    ) -> list[pa.RecordBatch]:
        """What lies at these places, by segment and in order, as slices of the segments' pages.

        From the archive come the rows whose `column` is wanted, of `columns` alone.
        """
        pieces = []
        for number, rows in split_places(places).items():
            try:
                pieces += self._segments.rows(number, rows)
            except (KeyError, FileNotFoundError):
                # It is in the archive alone, perhaps since a moment ago.
                where = pc.field(column).isin(list(dict.fromkeys(wanted)))
                pieces += self._sealed.read(number, where, columns).to_batches()
        return pieces

    def gather(self, places: Sequence[int], column: str, wanted: Sequence[str]) -> pa.Table:
        """The rows at these places whose `column` is wanted, in the order wanted."""
        batches = self.find(places, column, wanted)
        return in_order(
            pa.Table.from_batches(batches, SPAN_SCHEMA).combine_chunks(), column, wanted
        )

    def parts(self) -> list[Part]:
        """What `scan` can be asked for."""
        return [
            (number, first)
            for number, segment in sorted(self._segments.known.items())
            for first in range(0, segment.rows, PART_ROWS)
        ] + [(number, 0) for number in self._sealed.only()]

    def scan(
        self, part: Part, columns: Sequence[str] | None, where: pc.Expression | None
    ) -> pa.Table:
        """One part's rows for which the expression holds, in order of arrival."""
        number, first = part
        try:
            table = self._segments.table(number, first).slice(0, PART_ROWS)
        except (KeyError, FileNotFoundError):
            # Its rows are in another order in the archive: the first part stands for all.
            nothing = pc.scalar(False) if first else where
            return self._sealed.read(number, nothing, columns)
        if where is not None:
            table = table.filter(where)
        return table if columns is None else table.select(list(columns))

    def behind(self, after: int, limit: int) -> tuple[int, pa.Table]:
        """At most `limit` rows behind a place, of one segment, and the place to go on from."""
        for number in sorted(set(self._segments.known) | set(self._sealed.known)):
            first = after & 0xFFFFFFFF if number == after >> 32 else 0
            if number < after >> 32:
                continue
            try:
                if first >= self._segments.known[number].rows:
                    continue
                table = self._segments.table(number, first).slice(0, limit)
                return number << 32 | first + table.num_rows, table
            except (KeyError, FileNotFoundError):
                # In the archive alone, in another order: all of it, also what was given before.
                rows = self._sealed.known[number].rows
                if first < rows and (table := self._sealed.read(number)).num_rows:
                    return number << 32 | rows, table
        return after, SPAN_SCHEMA.empty_table()


def in_order(table: pa.Table, column: str, wanted: Sequence[str]) -> pa.Table:
    """The rows whose `column` is wanted: in the order wanted, by attempt, then by `sequence`.

    A table that is so already is given as it is.
    """
    ranks = _codes(table[column], {name: rank for rank, name in enumerate(wanted)})
    attempts = ranks if column == "attempt_id" else _attempt_codes(table["attempt_id"])
    sequence = table["sequence"].to_numpy()
    if (ranks >= 0).all():
        same = np.diff(ranks) == 0
        step = np.diff(attempts)
        good = (np.diff(ranks) > 0) | same & ((step > 0) | (step == 0) & (np.diff(sequence) > 0))
        if good.all():
            return table
    order = np.lexsort((sequence, attempts, ranks))
    return table.take(pa.array(order[np.searchsorted(ranks[order], 0) :]))


def rollout_of(attempt_id: str) -> str:
    """The rollout that an attempt ("ROLLOUT/N") belongs to."""
    return attempt_id.rpartition("/")[0]


def _attempt_codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Numbers that order attempts of one rollout: N of "ROLLOUT/N"."""
    names = column.combine_chunks().dictionary_encode()
    numbers = {name: int(name.rpartition("/")[2] or 0) for name in names.dictionary.to_pylist()}
    return _codes(column, numbers)


def _codes(column: pa.ChunkedArray, code_of: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """For each row the code of its text, -1 where it has none: int64[rows]."""
    if len(column) == 0:
        return np.empty(0, np.int64)
    names = column.combine_chunks().dictionary_encode()
    codes = np.fromiter((code_of.get(n, -1) for n in names.dictionary.to_pylist()), np.int64)
    return codes[names.indices.to_numpy()]
