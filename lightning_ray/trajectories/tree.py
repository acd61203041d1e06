"""The token tree of an attempt: its model calls, rebuilt, and which call exactly continues which.

Invariant: concatenating what a path of the tree adds reproduces exactly the tokens the engine saw
and sampled. An edge exists where a call's prompt begins with the whole of another call (its prompt
and everything it sampled), token for token. So a conversation that only grows is one path, a
rewritten context is a path of its own, and two calls that go on from the same one share it.

What the store says in `continues` is how a call was compressed, not how the tree is shaped: two
calls may share a prefix in storage without one exactly continuing the other.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.schema import SpanKind, SpanStatus

TokenArray = npt.NDArray[np.int32]
LogprobArray = npt.NDArray[np.float32]
VersionArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Call:
    """One model call of an attempt with its tokens in full."""

    span_id: str
    sequence: int
    """Its place in the attempt, as the store assigned it."""
    status: SpanStatus
    policy: str | None
    version: int | None
    """The version of `policy` that sampled the first token, and those that `versions` does not tell
    of; None where nobody recorded it."""
    tokens: TokenArray
    """int32[T]: what the engine saw, then what it sampled."""
    logprobs: LogprobArray
    """float32[S]: natural logarithms of the last S tokens, the sampled ones."""
    continues: str | None
    """The span id of the call whose prefix this one was stored against."""
    role: str | None = None
    """Which part of the agent's system asked; None where nobody recorded it."""
    versions: VersionArray | None = None
    """int32[S]: the version of each sampled token; None where it is `version` for all."""
    place: int = 0
    """Which of the attempt's model calls it was, from 0, those without tokens among them."""

    @property
    def prompt_length(self) -> int:
        """How many of `tokens` the engine was given; the rest it sampled."""
        return len(self.tokens) - len(self.logprobs)


@dataclass(frozen=True, eq=False)
class TokenTree:
    """An attempt's calls in order of arrival, and for each the call that it exactly continues."""

    attempt_id: str
    rollout_id: str
    calls: tuple[Call, ...]
    parents: tuple[int | None, ...]
    """For each call the index of the longest call that its prompt begins with, else None."""
    asked: int
    """Model calls of the attempt, those without tokens among them."""

    def leaves(self) -> list[int]:
        """Indices of the calls that no other call exactly continues, in order of arrival."""
        inner = {parent for parent in self.parents if parent is not None}
        return [index for index in range(len(self.calls)) if index not in inner]

    def path(self, leaf: int) -> list[int]:
        """Indices of the calls from the root to `leaf`, both included."""
        path: list[int] = []
        index: int | None = leaf
        while index is not None:
            path.append(index)
            index = self.parents[index]
        return path[::-1]


@dataclass(frozen=True)
class _StoredCall:
    """A row of the span table, with the tokens it adds."""

    call: Call
    prefix_tokens: int | None
    added: TokenArray | None


class _InexactError(Exception):
    """An attempt's rows do not add up to the tokens that were seen; the message says where."""


def rebuild_trees(spans: pa.Table) -> tuple[list[TokenTree], dict[str, str]]:
    """Rebuild the token tree of every attempt that has a model call.

    Args:
        spans: rows of `SPAN_SCHEMA`, of any attempts and kinds, in any order.

    Returns:
        The trees, in the order in which the attempts first appear, and for each attempt that could
        not be rebuilt exactly (a missing parent, a prefix longer than its parent, tokens or
        logprobs that are missing) its id with the reason. Nothing is guessed: such an attempt has
        no tree at all.
    """
    by_attempt: dict[str, list[_StoredCall]] = defaultdict(list)
    rollouts: dict[str, str] = {}
    asked: dict[str, list[int]] = defaultdict(list)
    for attempt_id, rollout_id, stored in _model_calls(spans):
        asked[attempt_id].append(stored.call.sequence)
        if stored.added is None and (
            stored.call.status is not SpanStatus.OK or stored.call.version is None
        ):
            # It failed before there was a token, or an API that shows none answered it: nothing
            # that could be learnt or shared.
            continue
        by_attempt[attempt_id].append(stored)
        rollouts[attempt_id] = rollout_id
    trees: list[TokenTree] = []
    inexact: dict[str, str] = {}
    for attempt_id, stored_calls in by_attempt.items():
        stored_calls.sort(key=lambda stored: stored.call.sequence)
        sequences = sorted(asked[attempt_id])
        try:
            calls = tuple(
                replace(call, place=bisect_left(sequences, call.sequence))
                for call in _rebuild(stored_calls)
            )
        except _InexactError as reason:
            inexact[attempt_id] = str(reason)
            continue
        parents = _exact_parents(calls)
        trees.append(TokenTree(attempt_id, rollouts[attempt_id], calls, parents, len(sequences)))
    return trees, inexact


def _model_calls(spans: pa.Table) -> Iterator[tuple[str, str, _StoredCall]]:
    """Read the model calls out of the table; tokens stay views of its buffers."""
    rows = spans.filter(pc.equal(spans["kind"], SpanKind.MODEL_CALL.value)).combine_chunks()
    if rows.num_rows == 0:
        return
    names = ["attempt_id", "rollout_id", "span_id", "sequence", "status", "policy", "version"]
    names += ["continues", "prefix_tokens", "role"]
    columns = [rows[name].to_pylist() for name in names]
    token_lists = _split_lists(rows["token_ids"], np.int32)
    logprob_lists = _split_lists(rows["logprobs"], np.float32)
    version_lists = _split_lists(rows["versions"], np.int32)
    for index, row in enumerate(zip(*columns, strict=True)):
        attempt_id, rollout_id, span_id, sequence, status, policy, version, *rest = row
        continues, prefix, role = rest
        logprobs = logprob_lists[index]
        call = Call(
            span_id=span_id,
            sequence=sequence,
            status=SpanStatus(status),
            policy=policy,
            version=version,
            tokens=np.empty(0, np.int32),
            logprobs=np.empty(0, np.float32) if logprobs is None else logprobs,
            continues=continues,
            role=role,
            versions=version_lists[index],
        )
        yield attempt_id, rollout_id, _StoredCall(call, prefix, token_lists[index])


def _split_lists(column: pa.ChunkedArray, dtype: npt.DTypeLike) -> list[Any]:
    """A list column as one array of `dtype` per row, None where the list is null."""
    pieces: list[Any] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        offsets = chunk.offsets.to_numpy()
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        pieces += [
            values[begin:end] if present else None
            for begin, end, present in zip(offsets[:-1], offsets[1:], valid, strict=True)
        ]
    return pieces


def _rebuild(stored_calls: Sequence[_StoredCall]) -> tuple[Call, ...]:
    """Give every call its tokens in full. Parents may have arrived after their children."""
    by_id = {stored.call.span_id: stored for stored in stored_calls}
    full: dict[str, TokenArray] = {}
    for stored in stored_calls:
        # Walk up to a call that is known or has no parent, then fill in on the way down.
        chain: list[_StoredCall] = []
        walked: set[str] = set()
        current = stored
        while current.call.span_id not in full:
            if current.call.span_id in walked:
                raise _InexactError(f"call {current.call.span_id} continues itself")
            walked.add(current.call.span_id)
            chain.append(current)
            if current.call.continues is None:
                break
            if current.call.continues not in by_id:
                raise _InexactError(
                    f"call {current.call.span_id} continues {current.call.continues}, "
                    "which is not in the attempt"
                )
            current = by_id[current.call.continues]
        for link in reversed(chain):
            full[link.call.span_id] = _full_tokens(link, full)
    return tuple(replace(one.call, tokens=full[one.call.span_id]) for one in stored_calls)


def _full_tokens(stored: _StoredCall, full: dict[str, TokenArray]) -> TokenArray:
    """The parent's prefix followed by what this call adds (the invariant of the span schema)."""
    span_id = stored.call.span_id
    if stored.added is None:
        raise _InexactError(f"call {span_id} has no tokens")
    if len(stored.call.logprobs) > len(stored.added):
        raise _InexactError(f"call {span_id} has more logprobs than tokens")
    if (versions := stored.call.versions) is not None and len(versions) != len(
        stored.call.logprobs
    ):
        raise _InexactError(f"call {span_id} does not say of each token which version sampled it")
    prefix = stored.prefix_tokens
    if stored.call.continues is None:
        if prefix:
            raise _InexactError(f"call {span_id} has a prefix but continues no call")
        return stored.added
    parent = full[stored.call.continues]
    if prefix is None or not 0 <= prefix <= len(parent):
        raise _InexactError(
            f"call {span_id} takes {prefix} tokens of {stored.call.continues}, "
            f"which has {len(parent)}"
        )
    return np.concatenate([parent[:prefix], stored.added])


def _exact_parents(calls: Sequence[Call]) -> tuple[int | None, ...]:
    """For each call the longest call whose every token its prompt begins with.

    Where several are equally long (a request that was repeated and gave the same answer), the one
    the call was stored against, else the latest. A call that sampled nothing is nobody's parent:
    there is nothing of its own to share.
    """
    by_length = sorted(
        (index for index, call in enumerate(calls) if len(call.logprobs)),
        key=lambda index: (-len(calls[index].tokens), -index),
    )
    parents: list[int | None] = []
    for index, call in enumerate(calls):
        best: int | None = None
        for candidate in by_length:
            other = calls[candidate]
            length = len(other.tokens)
            if best is not None and length < len(calls[best].tokens):
                break
            # Shorter than itself, so a call is never its own ancestor.
            if length > call.prompt_length or candidate == index:
                continue
            if not np.array_equal(other.tokens, call.tokens[:length]):
                continue
            if best is None or other.span_id == call.continues:
                best = candidate
        parents.append(best)
    return tuple(parents)
