"""Spans that somebody else's engine recorded: model calls with their tokens, among others.

Invariants: a row lands in a rollout of the caller that sent it, whatever it says; its tokens are of
a policy that is known here. That they are what that engine sampled is the sender's word: only a
caller that is trusted with it may send them.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.bulk import (
    FOREIGN_KINDS,
    OURS,
    Mask,
    checks_of_rows,
    hexadecimal,
    judge,
    mask,
    parse_rows,
    settled,
)
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.schema import SpanKind

RECORDED_KINDS = (SpanKind.MODEL_CALL, *FOREIGN_KINDS)
"""What a recorder's span may be; how an attempt ended only a worker says."""

_ROLLOUT = r"\A[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\z"
_ATTEMPT = r"\A.*(/[1-9][0-9]{0,5})\z"


def read_recorded(
    body: bytes,
    limits: TelemetryLimits,
    run_id: str,
    reserved: str,
    owner: str,
    policies: Collection[str],
    source: str,
) -> tuple[pa.RecordBatch, Counter[str]]:
    """The rows of an Arrow IPC stream as one batch of SPAN_SCHEMA, and why others are refused.

    A row says its `rollout_id`, which becomes OWNER + `rollout_id` where it does not begin so, and
    maybe its `attempt_id`, "ROLLOUT/N" with N from 1; without one it is of the first attempt. So
    the same rows name the same rollouts whenever they are sent, and are stored once.

    Args:
        reserved: How every caller's rollouts begin.
        owner: How this caller's begin.
        policies: Names of the policies whose tokens are known here.

    Raises:
        UndecodableError: it is no such stream, or its columns are not those of SPAN_SCHEMA.
        TooMuchError: it has more rows than `limits` allow.
    """
    given = parse_rows(body, limits, ["run_id"])
    named = pc.starts_with(given["rollout_id"], reserved)
    mine = pc.starts_with(given["rollout_id"], owner)
    good, number = _attempts(given)

    def checks() -> Iterator[tuple[str, Mask]]:
        yield (
            "rollout_id is not 1 to 128 letters, digits, dots, colons, dashes and underscores",
            mask(pc.match_substring_regex(given["rollout_id"], pattern=_ROLLOUT)),
        )
        yield "its rollout is no conversation of this key", mask(pc.or_(mine, pc.invert(named)))
        yield "attempt_id is not ROLLOUT_ID/N with N from 1 to 999999", good
        yield from checks_of_rows(given, limits, RECORDED_KINDS)
        yield from _call_checks(given, policies)

    keep, refused = judge(given, checks())
    kept = pa.array(keep)
    rows = given.filter(kept)
    rollouts = pc.if_else(
        mine.filter(kept),
        rows["rollout_id"],
        pc.binary_join_element_wise(owner, rows["rollout_id"], ""),
    )
    place = {
        "run_id": pa.repeat(pa.scalar(run_id, pa.string()), rows.num_rows),
        "rollout_id": rollouts,
        "attempt_id": pc.binary_join_element_wise(rollouts, number.filter(kept), ""),
    }
    return settled(rows, place, source), refused


def _attempts(batch: pa.RecordBatch) -> tuple[Mask, pa.Array]:
    """Which rows have an attempt of their rollout, or none; and "/N"."""
    said = batch["attempt_id"]
    if said.null_count == len(said):
        return np.ones(len(said), np.bool_), pa.repeat(pa.scalar("/1"), len(said))
    number = pc.replace_substring_regex(said, pattern=_ATTEMPT, replacement=r"\1")
    # One that does not end so stays whole, and is never itself behind a rollout's id.
    own = pc.equal(said, pc.binary_join_element_wise(batch["rollout_id"], number, ""))
    return mask(pc.fill_null(own, True)), pc.fill_null(number, "/1")


def _call_checks(batch: pa.RecordBatch, policies: Collection[str]) -> Iterator[tuple[str, Mask]]:
    call = mask(pc.equal(batch["kind"], SpanKind.MODEL_CALL.value))
    filled = np.zeros(batch.num_rows, np.bool_)
    for name in OURS:
        filled |= mask(pc.is_valid(batch[name]))
    yield f"only a model call has {', '.join(OURS)}", call | ~filled
    known = mask(pc.is_in(batch["policy"], pa.array(sorted(policies), pa.string())))
    version = mask(pc.greater_equal(batch["version"], 0))
    yield (
        "a model call needs a version of at least 0, and a policy that is served here: "
        + ", ".join(sorted(policies)),
        ~call | (known & version),
    )
    tokens, logprobs = batch["token_ids"], batch["logprobs"]
    yield (
        "token_ids has none, or one that is null or below 0",
        ~call | (_counts(tokens) > 0) & _each(tokens, lambda some: pc.greater_equal(some, 0)),
    )
    yield (
        "logprobs has more than token_ids, or one that is null, not finite or above 0",
        ~call | (_counts(logprobs) <= _counts(tokens)) & _each(logprobs, _is_logprob),
    )
    versions = batch["versions"]
    yield (
        "versions is not one of at least 0 for each of logprobs, the first of them version",
        ~call
        | mask(pc.is_null(versions))
        | (_counts(versions) == _counts(logprobs))
        & _each(versions, lambda some: pc.greater_equal(some, 0))
        & (_firsts(versions) == pc.fill_null(batch["version"], -1).to_numpy()),
    )
    goes_on = mask(pc.is_valid(batch["continues"]))
    prefix = pc.fill_null(batch["prefix_tokens"], 0).to_numpy()
    yield (
        "continues and prefix_tokens go together: 16 hexadecimal digits, and at least 1",
        hexadecimal(batch["continues"], 16, True) & np.where(goes_on, prefix > 0, prefix == 0),
    )


def _counts(lists: pa.ListArray) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    """How many each list has; 0 for null."""
    counts: np.ndarray[tuple[int], np.dtype[np.int32]]
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return counts


def _firsts(lists: pa.ListArray) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    """The first value of each list; -2 for null, and for a list without one."""
    values = pc.fill_null(lists.values, -2).to_numpy(zero_copy_only=False)
    begins = np.minimum(lists.offsets.to_numpy()[:-1], max(len(values) - 1, 0))
    found = values[begins] if len(values) else np.full(len(lists), -2, np.int32)
    firsts: np.ndarray[tuple[int], np.dtype[np.int32]]
    firsts = np.where(_counts(lists) > 0, found, -2)
    return firsts


def _is_logprob(values: pa.Array) -> pa.Array:
    return pc.and_(pc.less_equal(values, 0.0), pc.is_finite(values))


def _each(lists: pa.ListArray, holds: Callable[[pa.Array], Any]) -> Mask:
    """Which lists have only values for which `holds` is true; for null and NaN it is not."""
    # By offsets: a null list may still have values, which `flatten` leaves out.
    edges = lists.offsets.to_numpy()
    values = lists.values.slice(edges[0], edges[-1] - edges[0])
    wrong = np.concatenate(([0], np.cumsum(~mask(holds(values)))))
    few: Mask = wrong[edges[1:] - edges[0]] == wrong[edges[:-1] - edges[0]]
    return few
