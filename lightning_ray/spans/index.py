"""Where the spans of a rollout lie, in a few bytes a span.

Invariant: `find` gives every value that was added under a key, oldest first, and may give others
whose key has the same 64 bits; whoever asks compares what lies there. Time to look up does not grow
with the number of keys but by its logarithm, and 16 bytes a span are held for each table.

Recent entries are in a dictionary; when it is full it becomes a sorted array, and arrays of like
size are merged, so that there are never more than about log2(n / recent) of them (O'Neil et al.,
"The Log-Structured Merge-Tree", 1996).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.int64]
Places = npt.NDArray[np.int64]

RECENT = 1 << 16
"""Entries that stay in the dictionary."""


class SortedRuns:
    """A multimap from 64-bit keys to 64-bit values that only grows, until it is rebuilt."""

    def __init__(self) -> None:
        self._recent: defaultdict[int, list[int]] = defaultdict(list)
        self._held = 0
        self._runs: list[tuple[Keys, Places]] = []

    def add(self, keys: Keys, values: Places) -> None:
        """Adds entries; both arrays have one length."""
        if len(keys) >= RECENT:
            self._settle()
            self._push(keys, values)
            return
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            self._recent[key].append(value)
        self._held += len(keys)
        if self._held >= RECENT:
            self._settle()

    def find(self, key: int) -> list[int]:
        """The values under a key, in the order in which they were added."""
        found: list[int] = []
        for keys, values in self._runs:
            start, end = np.searchsorted(keys, (key, key)), np.searchsorted(keys, key, "right")
            found += values[start[0] : end].tolist()
        return found + self._recent.get(key, [])

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """For each key whether it is there: bool[len(keys)]."""
        recent = self._recent
        there = np.fromiter((key in recent for key in keys.tolist()), bool, len(keys))
        for run, _ in self._runs:
            place = np.searchsorted(run, keys)
            place[place == len(run)] = 0
            there |= run[place] == keys
        return there

    def _settle(self) -> None:
        if not self._held:
            return
        keys = np.fromiter(self._recent, np.int64, len(self._recent))
        counts = np.fromiter(map(len, self._recent.values()), np.int64, len(self._recent))
        values = np.fromiter(
            (value for found in self._recent.values() for value in found), np.int64, self._held
        )
        self._recent.clear()
        self._held = 0
        self._push(np.repeat(keys, counts), values)

    def _push(self, keys: Keys, values: Places) -> None:
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        # Older entries come first in a merge, and the sort is stable: order of arrival is kept.
        while self._runs and len(self._runs[-1][0]) <= 2 * len(keys):
            older_keys, older_values = self._runs.pop()
            keys = np.concatenate((older_keys, keys))
            values = np.concatenate((older_values, values))
            order = np.argsort(keys, kind="stable")
            keys, values = keys[order], values[order]
        self._runs.append((keys, values))


def key_of(*parts: str) -> int:
    """A signed 64-bit key of texts, for this process alone: nobody outside can aim at one."""
    return hash(parts)


def keys_of(*columns: Sequence[str]) -> Keys:
    """`key_of` for rows given as columns: int64[rows]."""
    return np.fromiter(map(hash, zip(*columns, strict=True)), np.int64, len(columns[0]))


class SpanIndex:
    """For each rollout the places of its spans, and whether a span of an attempt is there.

    A place is `segment << 32 | row`, a row's number in its segment.
    """

    def __init__(self) -> None:
        self._by_rollout = SortedRuns()
        self._by_span = SortedRuns()
        self.spans = 0
        """How many spans are indexed."""

    def add(self, batch: pa.RecordBatch, first: int) -> None:
        """Indexes a batch of SPAN_SCHEMA whose first row is at the place `first`."""
        places = np.arange(first, first + batch.num_rows)
        self._by_rollout.add(keys_of(batch.column("rollout_id").to_pylist()), places)
        self._by_span.add(keys_of(*names_of(batch)), places)
        self.spans += len(places)

    def places(self, rollout: str) -> list[int]:
        """Where the rollout's spans lie, in order of arrival; there may be strangers among them."""
        return self._by_rollout.find(key_of(rollout))

    def suspects(self, attempts: Sequence[str], span_ids: Sequence[str]) -> list[int]:
        """Where spans lie that may be these; none for a span that is not there."""
        keys = keys_of(attempts, span_ids)
        known = keys[self._by_span.contains(keys)]
        return [place for key in np.unique(known).tolist() for place in self._by_span.find(key)]


def names_of(batch: pa.RecordBatch) -> tuple[list[str], list[str]]:
    """What a span is known by: its attempt's id and its own, a column each."""
    return batch.column("attempt_id").to_pylist(), batch.column("span_id").to_pylist()


def split_places(places: Iterable[int]) -> dict[int, Places]:
    """Places by segment: for each the row numbers, int64, in the order given."""
    array = np.fromiter(places, np.int64)
    segments = array >> 32
    rows = array & 0xFFFFFFFF
    return {int(number): rows[segments == number] for number in np.unique(segments)}
