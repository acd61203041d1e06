"""Token trees as rows: what sequences share is computed once.

Invariant: the nodes of a row are the distinct prefixes of the sequences in it, in depth-first
order, and node j is an ancestor of node i (or i itself) exactly when `j <= i < subtree_end[j]`.
A token attends to its ancestors and sits at its depth, so what a node computes is what the last
token of that prefix computes in a row of its own. Every trainable token of the batch is an entry of
exactly one row. Nothing is truncated.

A sequence is cut after the last position that predicts a trainable token: what comes after has no
influence on the loss.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_ray.algorithms.config import LossConfig
from lightning_ray.algorithms.weights import token_weights
from lightning_ray.trajectories.batch import list_arrays

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Row:
    """A forest of T nodes, N trainable tokens, and M distinct logprobs that they need.

    Several samples may have taken the same token at the same place: they share a logprob.
    """

    input_ids: IntArray
    """int64[T]"""
    position_ids: IntArray
    """int64[T]: depth of the node, counted from 0."""
    subtree_end: IntArray
    """int64[T]: one past the last descendant of the node."""
    logit_predictor: IntArray
    """int64[M]: the node whose hidden state predicts."""
    logit_target: IntArray
    """int64[M]: the token it predicts."""
    entry: IntArray
    """int64[N]: which of the M logprobs a trainable token has."""
    token: IntArray
    """int64[N]: which of the batch's trainable tokens it is, counted over rows of the table."""
    sequence: IntArray
    """int64[N]: which of the row's sequences it belongs to, from 0, never falling. A sequence is
    whole in its row, its tokens in order."""
    old_logprobs: FloatArray
    """float32[N]: as recorded where the token was sampled."""
    advantages: FloatArray
    """float32[N]"""
    weights: FloatArray
    """float32[N]: share of the token in the batch loss."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch as rows, with what was counted on the way."""

    rows: list[Row]
    trainable_tokens: int
    """Trainable tokens of the table, those at position 0 included."""
    unlearnable_tokens: int
    """Trainable tokens at position 0, which nothing predicts. In no row."""
    total_tokens: int
    """Sum of the lengths of the sequences, as they are in the table."""
    distinct_tokens: int
    """Sum of the sizes of the rows: what is computed."""

    def total_weight(self) -> float:
        """Sum of weights times advantages over the batch; every rank has packed all of it."""
        with np.errstate(all="ignore"):  # what is not finite is found in the loss
            return sum(float(np.dot(row.weights, row.advantages)) for row in self.rows)


@dataclass(frozen=True, eq=False)
class _Sequence:
    """A sequence cut to what is computed, and its entries."""

    tokens: IntArray
    positions: IntArray
    """Positions of its trainable tokens, all greater than 0."""
    targets: IntArray
    token: IntArray
    """For each of them its index among the batch's trainable tokens."""


class _RowBuilder:
    """Sequences in lexicographic order become a forest; each is compared with the one before."""

    def __init__(self) -> None:
        self.size = 0
        self._ids: list[IntArray] = []
        self._positions: list[IntArray] = []
        self._closed: list[tuple[IntArray, int]] = []
        self._predictors: list[IntArray] = []
        self._targets: list[IntArray] = []
        self._tokens: list[IntArray] = []
        self._last = np.empty(0, np.int64)
        self._path = np.empty(0, np.int64)

    def shared(self, tokens: IntArray) -> int:
        """Length of the prefix that is already in the row."""
        length = min(len(tokens), len(self._last))
        different = np.flatnonzero(tokens[:length] != self._last[:length])
        return int(different[0]) if len(different) else length

    def add(self, sequence: _Sequence) -> None:
        """Append the nodes that the row does not have yet."""
        shared = self.shared(sequence.tokens)
        length = len(sequence.tokens)
        self._closed.append((self._path[shared:], self.size))
        new = np.arange(self.size, self.size + length - shared)
        self._ids.append(sequence.tokens[shared:])
        self._positions.append(np.arange(shared, length))
        self.size += length - shared
        self._last = sequence.tokens
        self._path = np.concatenate([self._path[:shared], new])
        self._predictors.append(self._path[sequence.positions - 1])
        self._targets.append(sequence.targets)
        self._tokens.append(sequence.token)

    def build(self, old_logprobs: FloatArray, advantages: FloatArray, weights: FloatArray) -> Row:
        """The row; arguments are per trainable token of the batch."""
        subtree_end = np.empty(self.size, np.int64)
        for nodes, end in [*self._closed, (self._path, self.size)]:
            subtree_end[nodes] = end
        pairs = np.stack([np.concatenate(self._predictors), np.concatenate(self._targets)])
        distinct, entry = np.unique(pairs, axis=1, return_inverse=True)
        token = np.concatenate(self._tokens)
        return Row(
            input_ids=np.concatenate(self._ids),
            position_ids=np.concatenate(self._positions),
            subtree_end=subtree_end,
            logit_predictor=distinct[0],
            logit_target=distinct[1],
            entry=entry.reshape(-1).astype(np.int64),
            token=token,
            sequence=np.repeat(np.arange(len(self._tokens)), [len(one) for one in self._tokens]),
            old_logprobs=old_logprobs[token],
            advantages=advantages[token],
            weights=weights[token],
        )


def pack(batch: pa.Table, tokens_per_row: int, loss: LossConfig | None = None) -> PackedBatch:
    """Pack a batch into rows.

    Args:
        batch: rows of `SEQUENCE_SCHEMA`.
        tokens_per_row: the most nodes in a row, unless a single sequence has more.
        loss: says what the weights make of the batch; None for a mean over tokens.

    Raises:
        ValueError: list columns of a row differ in length.
    """
    offsets, token_ids = list_arrays(batch["token_ids"])
    columns = {name: list_arrays(batch[name]) for name in ("trainable", "logprobs", "advantages")}
    for name, (other, _) in columns.items():
        if not np.array_equal(offsets, other):
            raise ValueError(f"column {name} differs in length from token_ids")
    places = np.flatnonzero(columns["trainable"][1])
    row_of = np.searchsorted(offsets, places, side="right") - 1
    learnable = places > offsets[row_of]
    weights = np.zeros(len(places), np.float32)
    loss = LossConfig() if loss is None else loss
    weights[learnable] = token_weights(
        _numbered(batch, "attempt_id")[row_of[learnable]],
        loss.aggregation,
        _numbered(batch, "group_id")[row_of[learnable]],
        loss.fixed_length,
    )
    rows = [
        builder.build(columns["logprobs"][1][places], columns["advantages"][1][places], weights)
        for builder in _fill(
            _sequences(offsets, token_ids.astype(np.int64), places, learnable), tokens_per_row
        )
    ]
    return PackedBatch(
        rows=rows,
        trainable_tokens=len(places),
        unlearnable_tokens=int(np.count_nonzero(~learnable)),
        total_tokens=len(token_ids),
        distinct_tokens=sum(len(row.input_ids) for row in rows),
    )


def share_of_rank(rows: list[Row], rank: int, num_ranks: int) -> list[Row]:
    """A rank's rows, largest first, padded with empty ones to the same number on every rank.

    Collectives happen once per pass, so every rank makes the same number of passes.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].input_ids), index))
    share = [rows[index] for index in order[rank::num_ranks]]
    most = -(-len(rows) // num_ranks)
    return share + [empty_row()] * (most - len(share))


def empty_row() -> Row:
    """The smallest row that a model can run; nothing in it is learnt."""
    nothing, numbers = np.empty(0, np.int64), np.empty(0, np.float32)
    return Row(
        input_ids=np.zeros(1, np.int64),
        position_ids=np.zeros(1, np.int64),
        subtree_end=np.ones(1, np.int64),
        logit_predictor=np.zeros(1, np.int64),
        logit_target=np.zeros(1, np.int64),
        entry=nothing,
        token=nothing,
        sequence=nothing,
        old_logprobs=numbers,
        advantages=numbers,
        weights=numbers,
    )


def _numbered(batch: pa.Table, name: str) -> IntArray:
    """For each row of the table a number that stands for its text in a column."""
    encoded = batch[name].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _sequences(
    offsets: IntArray, token_ids: IntArray, places: IntArray, learnable: npt.NDArray[np.bool_]
) -> Iterable[_Sequence]:
    """The sequences that have something to learn, in lexicographic order of their tokens."""
    # Where the trainable tokens of each row begin in `places`.
    bounds = np.searchsorted(places, offsets)
    sequences: list[_Sequence] = []
    for row in range(len(offsets) - 1):
        token = np.arange(bounds[row], bounds[row + 1])
        token = token[learnable[token]]
        if not len(token):
            continue
        positions = places[token] - offsets[row]
        tokens = token_ids[offsets[row] : offsets[row] + positions[-1]]
        sequences.append(_Sequence(tokens, positions, token_ids[places[token]], token))
    return sorted(sequences, key=_order)


def _fill(sequences: Iterable[_Sequence], tokens_per_row: int) -> list[_RowBuilder]:
    """Rows of sequences, given in lexicographic order.

    First neighbours are put together for as long as they share a beginning and fit into a row; then
    these chunks are packed, the largest first, each into the first row that has room for it. A
    chunk that shares nothing with what is in a row costs what it costs alone.
    """
    chunks: list[list[_Sequence]] = []
    size = 0
    builder = _RowBuilder()
    for sequence in sequences:
        shared = builder.shared(sequence.tokens)
        added = len(sequence.tokens) - shared
        if not chunks or shared == 0 or size + added > tokens_per_row:
            chunks.append([])
            builder, size, added = _RowBuilder(), 0, len(sequence.tokens)
        builder.add(sequence)
        chunks[-1].append(sequence)
        size += added
    return [_built(row) for row in _first_fit(chunks, tokens_per_row)]


def _first_fit(
    chunks: Sequence[list[_Sequence]], tokens_per_row: int
) -> list[list[list[_Sequence]]]:
    """Chunks by row: first fit, decreasing (Johnson, 1973)."""
    sizes = [_built([chunk]).size for chunk in chunks]
    rows: list[list[list[_Sequence]]] = []
    left: list[int] = []
    for index in sorted(range(len(chunks)), key=lambda index: (-sizes[index], index)):
        row = next((row for row, room in enumerate(left) if sizes[index] <= room), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(tokens_per_row)
        rows[row].append(chunks[index])
        left[row] -= sizes[index]
    return rows


def _built(chunks: Sequence[list[_Sequence]]) -> _RowBuilder:
    builder = _RowBuilder()
    for sequence in sorted((one for chunk in chunks for one in chunk), key=_order):
        builder.add(sequence)
    return builder


def _order(sequence: _Sequence) -> bytes:
    # Big-endian bytes of numbers that are not negative sort as the numbers do.
    return sequence.tokens.astype(">i8").tobytes()


def foreign_tokens(batch: pa.Table, known: int) -> str | None:
    """Why a batch cannot be of a model that knows so many tokens; None if it can."""
    _, tokens = list_arrays(batch["token_ids"])
    if not len(tokens) or 0 <= tokens.min() <= tokens.max() < known:
        return None
    strange = tokens.max() if tokens.max() >= known else tokens.min()
    return (
        f"the batch has token {strange}, the model knows 0 to {known - 1}: it was sampled with "
        "another tokenizer"
    )


def trainable_values(batch: pa.Table, name: str) -> npt.NDArray[np.generic]:
    """The values of a list column where `trainable` is true, of all rows one after the other."""
    _, trainable = list_arrays(batch["trainable"])
    _, values = list_arrays(batch[name])
    selected: npt.NDArray[np.generic] = values[trainable.astype(np.bool_)]
    return selected
