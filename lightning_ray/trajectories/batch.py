"""The batch that a learner trains on: one row per token sequence, Arrow list columns.

Invariant: `token_ids`, `trainable`, `logprobs`, `versions`, `calls` and `advantages` of a row have
the same length. A sequence is one root-to-leaf path of an attempt's token tree, so a history that
several calls share appears once per leaf; each sampled token is `trainable` in exactly one row.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SEQUENCE_SCHEMA = pa.schema(
    [
        # Sequences with one group are samples of the same task: they are compared with each other.
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("attempt_id", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        # True where the policy sampled the token and it is to be learnt from.
        pa.field("trainable", pa.list_(pa.bool_()), nullable=False),
        # Logprob under the policy that sampled it; 0 where not trainable.
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        # The policy version that sampled it; -1 where not trainable.
        pa.field("versions", pa.list_(pa.int32()), nullable=False),
        # Which call of its attempt sampled it, in order of arrival from 0; -1 where not trainable.
        pa.field("calls", pa.list_(pa.int32()), nullable=False),
        # Credit of the token; 0 where not trainable, and before an algorithm has given any.
        pa.field("advantages", pa.list_(pa.float32()), nullable=False),
    ]
)


def list_arrays(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """A list column as (offsets int64[R + 1], values[T]); row r is values[offsets[r]:offsets[r+1]].

    Offsets start at zero whatever slice of a larger table the column is. Numbers are not copied;
    booleans, which Arrow keeps as bits, are.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a column without chunks, or one that stays in several
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    return offsets - offsets[0], values.to_numpy(zero_copy_only=False)


def list_column(
    offsets: npt.NDArray[np.int64], values: npt.NDArray[Any], kind: pa.DataType
) -> pa.ListArray:
    """The reverse of `list_arrays`: values of the Arrow type `kind`, split at `offsets`."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, kind))
