"""Spans in bulk: an Arrow IPC stream of SPAN_SCHEMA rows from somebody who is not trusted.

Invariants: the rows go where the caller says, whatever they say; nothing that an engine records
(a model call, tokens, policy, version) or a worker (how an attempt ended) can be said by them; no
row becomes a Python object. The stream is read only after its frames were seen to be whole,
uncompressed and no longer than allowed, so that it cannot grow while it is read.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.frames import check_frames
from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.masking import mask_columns
from lightning_ray.spans.otlp import UndecodableError
from lightning_ray.spans.query import query
from lightning_ray.spans.schema import SPAN_SCHEMA, SpanKind, SpanStatus
from lightning_ray.spans.telemetry import EARLIEST_NS

Mask = npt.NDArray[np.bool_]

FOREIGN_KINDS = (
    SpanKind.TOOL_CALL,
    SpanKind.AGENT_STEP,
    SpanKind.MESSAGE,
    SpanKind.REWARD,
    SpanKind.FEEDBACK,
)
"""What an agent's span may be; model calls are for engines to record, `resource` for workers."""

OURS = (
    "role",
    "policy",
    "version",
    "versions",
    "continues",
    "prefix_tokens",
    "token_ids",
    "logprobs",
    "finish_reason",
)
_REQUIRED = ("span_id", "kind", "name")
_PLACE = ("run_id", "rollout_id", "attempt_id")
_TEXTS = ("name", "agent", "model", "tool")


def read_bulk(
    body: bytes, limits: TelemetryLimits, place: tuple[str, str, str], source: str
) -> tuple[pa.RecordBatch, Counter[str]]:
    """The rows of an Arrow IPC stream as one batch of SPAN_SCHEMA, and why others are refused.

    Args:
        place: Run, rollout and attempt that the spans belong to.
        source: Whose they are: "agent" or "service".

    Raises:
        UndecodableError: it is no such stream, or its columns are not those of SPAN_SCHEMA.
        TooMuchError: it has more rows than `limits` allow.
    """
    given = parse_rows(body, limits, _PLACE)
    keep, refused = judge(given, _checks(given, limits))
    kept = given.filter(pa.array(keep))
    rows = kept.num_rows
    placed = [pa.repeat(pa.scalar(value, pa.string()), rows) for value in place]
    return settled(kept, dict(zip(_PLACE, placed, strict=True)), source), refused


def parse_rows(body: bytes, limits: TelemetryLimits, ignored: Sequence[str]) -> pa.RecordBatch:
    """A stream's rows with every column of SPAN_SCHEMA; those named `ignored` are null.

    Times and status have their defaults where they are missing. Raises as `read_bulk`.
    """
    check_frames(body, limits)
    try:
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            _check_columns(reader.schema)
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
        table = pa.Table.from_batches(batches, reader.schema)
        columns = [_column(table, field, ignored) for field in SPAN_SCHEMA]
    except UndecodableError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UndecodableError(f"the body is no Arrow stream of spans: {reason}") from error
    return _with_defaults(pa.RecordBatch.from_arrays(columns, names=SPAN_SCHEMA.names))


def _check_columns(schema: pa.Schema) -> None:
    if len(set(schema.names)) < len(schema.names):
        raise UndecodableError("the stream has two columns of one name")
    for name in schema.names:
        if name not in SPAN_SCHEMA.names:
            raise UndecodableError(
                f"column {name!r} is none of the span schema; the columns are: "
                f"{', '.join(SPAN_SCHEMA.names)}"
            )
    for name in _REQUIRED:
        if name not in schema.names:
            raise UndecodableError(f"the column {name} is missing")


def _column(table: pa.Table, field: pa.Field, ignored: Sequence[str]) -> pa.Array:
    if field.name not in table.column_names or field.name in ignored:
        return pa.nulls(table.num_rows, field.type)
    column = table[field.name]
    return (column if column.type == field.type else column.cast(field.type)).combine_chunks()


def _with_defaults(batch: pa.RecordBatch) -> pa.RecordBatch:
    now = time.time_ns()
    columns = {name: batch[name] for name in batch.schema.names}
    columns["start_ns"] = pc.fill_null(pc.coalesce(columns["start_ns"], columns["end_ns"]), now)
    columns["end_ns"] = pc.coalesce(columns["end_ns"], columns["start_ns"])
    columns["status"] = pc.fill_null(columns["status"], SpanStatus.OK.value)
    return pa.RecordBatch.from_pydict(columns)


def judge(batch: pa.RecordBatch, checks: Iterable[tuple[str, Mask]]) -> tuple[Mask, Counter[str]]:
    """Which rows are taken, and how many are not for each reason.

    A check is a reason to refuse a row, with the rows that it does not concern.
    """
    keep = np.ones(batch.num_rows, np.bool_)
    refused: Counter[str] = Counter()
    for reason, good in checks:
        bad = keep & ~good
        if bad.any():
            refused[reason] = int(bad.sum())
            keep &= good
    return keep, refused


def _checks(batch: pa.RecordBatch, limits: TelemetryLimits) -> Iterator[tuple[str, Mask]]:
    yield from checks_of_rows(batch, limits, FOREIGN_KINDS)
    ours = np.zeros(batch.num_rows, np.bool_)
    for name in OURS:
        ours |= mask(pc.is_valid(batch[name]))
    yield f"only an engine may fill {', '.join(OURS)}", ~ours


def checks_of_rows(
    batch: pa.RecordBatch, limits: TelemetryLimits, allowed: Sequence[SpanKind]
) -> Iterator[tuple[str, Mask]]:
    """What `judge` looks at in every row, whoever sends it."""
    kinds = pa.array([kind.value for kind in allowed])
    statuses = pa.array([status.value for status in SpanStatus])
    yield "span_id is not 16 hexadecimal digits", hexadecimal(batch["span_id"], 16, False)
    yield "trace_id is not 32 hexadecimal digits", hexadecimal(batch["trace_id"], 32, True)
    yield (
        "parent_span_id is not 16 hexadecimal digits",
        hexadecimal(batch["parent_span_id"], 16, True),
    )
    yield f"kind is none of {', '.join(kinds.to_pylist())}", mask(pc.is_in(batch["kind"], kinds))
    yield "status is none of ok, error, aborted", mask(pc.is_in(batch["status"], statuses))
    yield "name is empty", mask(pc.greater(pc.binary_length(batch["name"]), 0))
    for name in _TEXTS:
        length = pc.fill_null(pc.binary_length(batch[name]), 0)
        short = mask(pc.less_equal(length, limits.max_value_bytes))
        yield f"{name} has more than {limits.max_value_bytes} bytes", short
    start, end = batch["start_ns"].to_numpy(), batch["end_ns"].to_numpy()
    latest = time.time_ns() + int(limits.max_clock_skew_s * 1e9)
    in_order = (start >= EARLIEST_NS) & (end <= latest) & (start <= end)
    yield "its times are before the year 2000, in the future, or in the wrong order", in_order
    reward = mask(pc.equal(batch["kind"], SpanKind.REWARD.value))
    finite = mask(pc.is_finite(batch["value"]))
    yield (
        "a reward needs a finite value, and nothing else has one",
        np.where(reward, finite, mask(pc.is_null(batch["value"]))),
    )
    for name in ("step", "input_tokens", "output_tokens", "cost_usd"):
        number = pc.and_(
            pc.greater_equal(batch[name], 0), pc.is_finite(pc.cast(batch[name], pa.float64()))
        )
        yield f"{name} is not a finite number of at least 0", mask(pc.fill_null(number, True))
    yield from _attribute_checks(batch["attributes"], limits)


def _attribute_checks(attributes: pa.Array, limits: TelemetryLimits) -> Iterator[tuple[str, Mask]]:
    length = pc.fill_null(pc.binary_length(attributes), 0)
    small = mask(pc.less_equal(length, limits.max_span_bytes))
    yield f"attributes have more than {limits.max_span_bytes} bytes", small
    if attributes.null_count == len(attributes):
        return
    flat = _shallow(attributes, limits.max_depth + 1)
    yield f"attributes are nested deeper than {limits.max_depth} levels", mask(flat)
    # What is deep or large was refused above; here it only must not be read.
    looked_at = pc.if_else(pc.and_(flat, pa.array(small)), attributes, None)
    valid = _valid_json(looked_at)
    yield "attributes are no JSON", valid
    # Valid JSON is an object where it begins as one.
    objects = mask(pc.fill_null(pc.match_substring_regex(looked_at, pattern=r"^\s*\{"), True))
    yield (
        "attributes are no JSON object, or have `cost_usd`, which is a column",
        objects & ~_has_cost(looked_at, valid),
    )


_OWN = threading.local()


def _valid_json(texts: pa.Array) -> Mask:
    """Which texts are JSON; null is."""
    # Opening DuckDB costs as much as looking at a thousand spans; each thread keeps its own.
    if not hasattr(_OWN, "duckdb"):
        _OWN.duckdb = duckdb.connect(config={"enable_external_access": "false", "threads": 1})
    _OWN.duckdb.register("texts", pa.table({"a": texts}))
    try:
        asked = _OWN.duckdb.execute("SELECT coalesce(json_valid(a), true) AS v FROM texts")
        valid: Mask = asked.fetchnumpy()["v"]
        return valid
    finally:
        _OWN.duckdb.unregister("texts")


def _has_cost(texts: pa.Array, valid: Mask) -> Mask:
    """Which texts, where they are JSON objects, have a cost of their own."""
    # Escaped in any way it has its first letter or a backslash; few have the word.
    suspect = mask(pc.match_substring_regex(texts, pattern=r"cost_usd|\\u00")) & valid
    if suspect.any():
        some = pa.table({"a": texts.filter(pa.array(suspect))})
        found = query(some, "SELECT json_exists(a, '$.cost_usd') AS c FROM spans")
        suspect[np.flatnonzero(suspect)] = mask(found["c"])
    return suspect


def _shallow(texts: pa.Array, limit: int) -> pa.Array:
    """Whether lists and objects lie at most `limit` deep in one another."""
    edges, data = _edges_and_bytes(texts)
    opening = (data == ord("[")) | (data == ord("{"))
    before = np.concatenate(([0], np.cumsum(opening, dtype=np.int32)))
    # The brackets of a text are an upper bound of its depth; few have more than the limit.
    many = pa.array(before[edges[1:]] - before[edges[:-1]] > limit)
    deep = pc.greater(depths(texts.filter(many)), limit)
    return pc.replace_with_mask(pc.invert(many), many, pc.invert(deep))


def _edges_and_bytes(texts: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Where each text begins and the last one ends, and the bytes of all of them."""
    offsets, data = (
        np.frombuffer(buffer or b"", kind)
        for buffer, kind in zip(texts.buffers()[1:], (np.int32, np.uint8), strict=True)
    )
    edges = offsets[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    return edges - edges[0], data[edges[0] : edges[-1]]


def depths(texts: pa.Array) -> pa.Array:
    """How many lists and objects lie in one another in each JSON text; 0 for null."""
    texts = pc.fill_null(texts, "")
    if len(texts) == 0:
        return pa.array([], pa.int64())
    edges, data = _edges_and_bytes(texts)
    places = np.flatnonzero(_SYNTAX[data])
    first = np.searchsorted(places, edges)
    rows = np.repeat(np.arange(len(texts)), np.diff(first))
    symbols = data[places]
    # Between quotes a bracket means nothing: an odd number of quotes came before it in its text.
    quote = symbols == ord('"')
    quote[quote] = ~_escaped(data, places[quote], edges[rows[quote]])
    before = np.cumsum(quote)
    start = np.concatenate(([0], before))[first[:-1]]
    outside = (before - start[rows]) % 2 == 0
    step = np.where((symbols == ord("[")) | (symbols == ord("{")), 1, -1)
    step[~outside | (symbols == ord('"'))] = 0
    level = np.concatenate(([0], np.cumsum(step)))
    highest = np.zeros(len(texts), np.int64)
    some = np.unique(rows)
    if len(some):
        tops = np.maximum.reduceat(level[1:], first[some])
        highest[some] = np.maximum(tops - level[first[some]], 0)
    return pa.array(highest)


_SYNTAX = np.zeros(256, np.bool_)
_SYNTAX[list(b'"[]{}')] = True


def _escaped(
    data: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], begins: npt.NDArray[np.int64]
) -> Mask:
    """Whether an odd number of backslashes stands before each of these quotes in its text."""
    odd = np.zeros(len(quotes), np.bool_)
    left = np.arange(len(quotes))
    at = quotes - 1
    while len(left):
        left = left[(at[left] >= begins[left]) & (data[np.maximum(at[left], 0)] == ord("\\"))]
        odd[left] ^= True
        at[left] -= 1
    return odd


def hexadecimal(column: pa.Array, digits: int, optional: bool) -> Mask:
    """Which texts are that many lower-case hexadecimal digits, and not all zero."""
    good = pc.match_substring_regex(column, pattern=rf"\A[0-9a-f]{{{digits}}}\z")
    zero = pc.equal(column, "0" * digits)
    return mask(pc.fill_null(pc.and_(good, pc.invert(zero)), optional))


def mask(array: pa.Array | pa.ChunkedArray) -> Mask:
    """As numpy; null is false."""
    full = pc.fill_null(array, False) if array.null_count else array
    filled: Mask = full.to_numpy(zero_copy_only=False)
    return filled.astype(np.bool_, copy=False)


def settled(batch: pa.RecordBatch, place: Mapping[str, pa.Array], source: str) -> pa.RecordBatch:
    """The rows at their place (run, rollout, attempt), without secrets, ready for the store."""
    columns = {name: batch[name] for name in batch.schema.names} | dict(place)
    columns["source"] = pa.repeat(pa.scalar(source, pa.string()), batch.num_rows)
    columns["sequence"] = pa.array(np.zeros(batch.num_rows, np.int64))
    columns |= mask_columns({name: columns[name] for name in (*_TEXTS, "attributes")})
    return pa.RecordBatch.from_arrays([columns[f.name] for f in SPAN_SCHEMA], schema=SPAN_SCHEMA)
