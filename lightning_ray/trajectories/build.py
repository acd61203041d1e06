"""From the token trees of a step's attempts to the table that a learner trains on.

Invariant: of the tokens that the trained policy sampled, each is trainable in exactly one row; a
token that the policy was given, that another policy sampled, or whose call was cut short is never
trainable (the last unless asked for).
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.schema import ATTEMPT_SPAN, SpanKind, SpanStatus
from lightning_ray.trajectories.batch import SEQUENCE_SCHEMA, list_arrays, list_column
from lightning_ray.trajectories.tree import Call, TokenTree, rebuild_trees

Credit = float | npt.NDArray[np.floating]


@dataclass(frozen=True)
class CallPlaces:
    """The calls of an attempt, in order of arrival; those with tokens are numbered from 0."""

    total: int
    """Model calls, those without tokens among them."""
    places: tuple[int, ...]
    """Which of them each call with tokens was, from 0."""
    roles: tuple[str | None, ...]
    """Which role asked, for each call with tokens."""


@dataclass(frozen=True)
class BuildReport:
    """What went in, and what was left out and why."""

    attempts: int
    """Attempts asked for."""
    calls: int
    """Model calls in the attempts that could be rebuilt."""
    sequences: int
    """Rows built."""
    trainable_tokens: int
    """Tokens to learn from, over all rows."""
    inexact: dict[str, str] = field(default_factory=dict)
    """Attempt id to reason: its spans do not add up to what the engine saw. Left out whole."""
    empty: tuple[str, ...] = ()
    """Attempts without a single token to learn from: no call, or none of the policy's."""
    asked: Mapping[str, CallPlaces] = field(default_factory=dict)
    """Attempt id to what is known of its calls, whoever answered them."""


@dataclass(frozen=True, eq=False)
class _Row:
    """One sequence before it becomes Arrow; arrays of one length."""

    group_id: str
    rollout_id: str
    attempt_id: str
    token_ids: npt.NDArray[np.int32]
    trainable: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    calls: npt.NDArray[np.int32]


def build_sequences(
    spans: pa.Table,
    groups: Mapping[str, str],
    policy: str,
    *,
    train_aborted: bool = False,
) -> tuple[pa.Table, BuildReport]:
    """Build the training sequences of some attempts.

    Args:
        spans: rows of `SPAN_SCHEMA`; rows of attempts not in `groups` are ignored.
        groups: attempt id to group id, for every attempt to build; rows come out in its order.
        policy: only calls that this policy answered are trainable. Others are observation.
        train_aborted: also learn from calls whose client went away before the end. Their tokens
            are exact as far as they go, but nobody acted on them.

    Returns:
        A table of `SEQUENCE_SCHEMA` with advantages of zero, and what was left out. A path of the
        tree on which nothing is trainable gives no row.
    """
    trees, inexact = rebuild_trees(spans)
    ended = _ends(spans)
    by_attempt = {tree.attempt_id: tree for tree in trees}
    rows: list[_Row] = []
    calls = 0
    empty: list[str] = []
    left_out: dict[str, str] = {}
    asked: dict[str, CallPlaces] = {}
    for attempt_id, group_id in groups.items():
        if attempt_id in inexact:
            left_out[attempt_id] = inexact[attempt_id]
            continue
        tree = by_attempt.get(attempt_id)
        if tree is None:
            empty.append(attempt_id)
            continue
        # What was sampled once the attempt was over is no part of what it was graded for.
        end = ended.get(attempt_id, sys.maxsize)
        trainable = {
            index
            for index, call in enumerate(tree.calls)
            if call.sequence < end and _learns(call, policy, train_aborted)
        }
        unversioned = [index for index in trainable if tree.calls[index].version is None]
        if unversioned:
            span_id = tree.calls[min(unversioned)].span_id
            left_out[attempt_id] = f"call {span_id} does not say which version sampled it"
            continue
        calls += len(tree.calls)
        asked[attempt_id] = CallPlaces(
            tree.asked,
            tuple(call.place for call in tree.calls),
            tuple(call.role for call in tree.calls),
        )
        built = _rows_of(tree, group_id, trainable)
        rows += built
        if not built:
            empty.append(attempt_id)
    report = BuildReport(
        attempts=len(groups),
        calls=calls,
        sequences=len(rows),
        trainable_tokens=sum(int(np.count_nonzero(row.trainable)) for row in rows),
        inexact=left_out,
        empty=tuple(empty),
        asked=asked,
    )
    return _table(rows, policy), report


def trainable_counts(sequences: pa.Table) -> dict[str, int]:
    """Number of tokens to learn from per attempt, in the order of first appearance."""
    offsets, trainable = list_arrays(sequences["trainable"])
    per_row = np.diff(np.concatenate([[0], np.cumsum(trainable)])[offsets])
    counts: dict[str, int] = {}
    for attempt_id, count in zip(sequences["attempt_id"].to_pylist(), per_row, strict=True):
        counts[attempt_id] = counts.get(attempt_id, 0) + int(count)
    return counts


def with_advantages(sequences: pa.Table, credit: Mapping[str, Credit]) -> pa.Table:
    """Put credit on the trainable tokens.

    Args:
        sequences: a table of `SEQUENCE_SCHEMA`.
        credit: per attempt one number for all its trainable tokens, or one number per trainable
            token: the attempt's rows in table order, positions ascending within a row.

    Returns:
        The same table with `advantages` replaced; tokens that are not trainable have 0.

    Raises:
        ValueError: an attempt without credit, credit of the wrong length, or a credit that is not
            a finite number.
    """
    offsets, trainable = list_arrays(sequences["trainable"])
    advantages = np.zeros(len(trainable), np.float32)
    taken: dict[str, int] = {}
    counts = trainable_counts(sequences)
    for attempt_id, count in counts.items():
        if attempt_id not in credit:
            raise ValueError(f"attempt {attempt_id} has no credit")
        value = np.asarray(credit[attempt_id], np.float64)
        if value.ndim and value.shape != (count,):
            raise ValueError(
                f"attempt {attempt_id} has {count} trainable tokens, credit of shape {value.shape}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"the credit of attempt {attempt_id} is not finite")
    for row, attempt_id in enumerate(sequences["attempt_id"].to_pylist()):
        begin, end = offsets[row], offsets[row + 1]
        places = begin + np.flatnonzero(trainable[begin:end])
        value = np.asarray(credit[attempt_id], np.float32)
        if value.ndim:
            start = taken.get(attempt_id, 0)
            taken[attempt_id] = start + len(places)
            value = value[start : start + len(places)]
        advantages[places] = value
    column = list_column(offsets, advantages, pa.float32())
    field_index = SEQUENCE_SCHEMA.get_field_index("advantages")
    return sequences.set_column(field_index, SEQUENCE_SCHEMA.field(field_index), column)


def _ends(spans: pa.Table) -> dict[str, int]:
    """The place of each attempt's end among its spans, where its worker recorded one."""
    rows = spans.filter(
        pc.and_(
            pc.equal(spans["kind"], SpanKind.RESOURCE.value), pc.equal(spans["name"], ATTEMPT_SPAN)
        )
    )
    found = zip(rows["attempt_id"].to_pylist(), rows["sequence"].to_pylist(), strict=True)
    # Spans that came through no store have no place yet.
    return {attempt_id: sequence for attempt_id, sequence in found if sequence}


def _learns(call: Call, policy: str, train_aborted: bool) -> bool:
    """Whether the tokens this call sampled are to be learnt from."""
    wanted = {SpanStatus.OK, SpanStatus.ABORTED} if train_aborted else {SpanStatus.OK}
    return call.policy == policy and call.status in wanted and len(call.logprobs) > 0


def _rows_of(tree: TokenTree, group_id: str, trainable_calls: set[int]) -> list[_Row]:
    """One row per leaf that has something to learn; a call is learnt in the first that holds it."""
    rows: list[_Row] = []
    claimed: set[int] = set()
    for leaf in tree.leaves():
        path = tree.path(leaf)
        learnt = [index for index in path if index in trainable_calls and index not in claimed]
        if not learnt:
            continue
        claimed.update(learnt)
        tokens = tree.calls[leaf].tokens
        trainable = np.zeros(len(tokens), np.bool_)
        logprobs = np.zeros(len(tokens), np.float32)
        versions = np.full(len(tokens), -1, np.int32)
        calls = np.full(len(tokens), -1, np.int32)
        for index in learnt:
            call = tree.calls[index]
            sampled = slice(call.prompt_length, len(call.tokens))
            trainable[sampled] = True
            logprobs[sampled] = call.logprobs
            versions[sampled] = (
                call.versions
                if call.versions is not None
                else -1
                if call.version is None
                else call.version
            )
            calls[sampled] = index
        rows.append(
            _Row(
                group_id,
                tree.rollout_id,
                tree.attempt_id,
                tokens,
                trainable,
                logprobs,
                versions,
                calls,
            )
        )
    return rows


def _table(rows: list[_Row], policy: str) -> pa.Table:
    """Rows to Arrow: one concatenation per column, no Python object per token."""
    lengths = [len(row.token_ids) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def lists(arrays: list[npt.NDArray[np.generic]], kind: pa.DataType) -> pa.ListArray:
        values = np.concatenate(arrays) if arrays else np.empty(0)
        return list_column(offsets, values, kind)

    columns = {
        "group_id": pa.array([row.group_id for row in rows], pa.string()),
        "rollout_id": pa.array([row.rollout_id for row in rows], pa.string()),
        "attempt_id": pa.array([row.attempt_id for row in rows], pa.string()),
        "policy": pa.array([policy] * len(rows), pa.string()),
        "token_ids": lists([row.token_ids for row in rows], pa.int32()),
        "trainable": lists([row.trainable for row in rows], pa.bool_()),
        "logprobs": lists([row.logprobs for row in rows], pa.float32()),
        "versions": lists([row.versions for row in rows], pa.int32()),
        "calls": lists([row.calls for row in rows], pa.int32()),
        "advantages": lists([np.zeros(n, np.float32) for n in lengths], pa.float32()),
    }
    return pa.table(columns, schema=SEQUENCE_SCHEMA)
