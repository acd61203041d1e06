"""Sequences that are longer than a learner is to compute, cut by whole calls.

Invariant: what is left of a sequence is its beginning, up to the end of a call, so every token that
is still learnt from has the context in which it was sampled. Credit was given before, for what the
whole attempt came to; what is cut moves no other attempt's baseline, and is counted.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lightning_ray.trajectories.batch import SEQUENCE_SCHEMA, list_arrays, list_column


@dataclass(frozen=True)
class Cut:
    """What was taken away."""

    sequences: int = 0
    """Sequences that lost a call."""
    calls: int = 0
    """Calls that are no longer learnt from."""
    tokens: int = 0
    """Sampled tokens of them."""


def cut_sequences(sequences: pa.Table, most: int) -> tuple[pa.Table, Cut]:
    """Cuts every sequence to at most so many tokens, from its end.

    Args:
        sequences: rows of SEQUENCE_SCHEMA, with their credit.
        most: tokens of a sequence; 0 for no limit.

    Returns:
        The sequences; those of which no call fits are gone. And what was taken away.
    """
    offsets, calls = list_arrays(sequences["calls"])
    lengths = np.diff(offsets)
    if most <= 0 or not (lengths > most).any():
        return sequences, Cut()
    kept_lengths = lengths.copy()
    gone_calls = gone_tokens = cut = 0
    for row in np.flatnonzero(lengths > most):
        mine = calls[offsets[row] : offsets[row + 1]]
        # A call ends where the next token is another's; it may reach up to `most`.
        ends = np.flatnonzero((mine >= 0) & (mine != np.append(mine[1:], -1))) + 1
        fitting = ends[ends <= most]
        kept_lengths[row] = fitting[-1] if len(fitting) else 0
        rest = mine[kept_lengths[row] :]
        gone_tokens += int(np.count_nonzero(rest >= 0))
        gone_calls += int(np.count_nonzero(ends > kept_lengths[row]))
        cut += int((rest >= 0).any())
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(calls)) - offsets[row_of]
    kept = place < kept_lengths[row_of]
    bounds = np.concatenate([[0], np.cumsum(kept_lengths)])
    columns = {}
    for name in sequences.schema.names:
        column = sequences[name]
        if pa.types.is_list(column.type):
            _, values = list_arrays(column)
            columns[name] = list_column(bounds, values[kept], column.type.value_type)
        else:
            columns[name] = column.combine_chunks()
    table = pa.table(columns, schema=SEQUENCE_SCHEMA)
    return table.filter(pa.array(kept_lengths > 0)), Cut(cut, gone_calls, gone_tokens)
