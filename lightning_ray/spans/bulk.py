"""Spans in bulk: an Arrow IPC stream of SPAN_SCHEMA rows from somebody who is not trusted.

Invariants: the rows go where the caller says, whatever they say; nothing that an engine records
(a model call, tokens, policy, version) or a worker (how an attempt ended) can be said by them; no
row becomes a Python object. The stream is read only after its frames were seen to be whole,
uncompressed and no longer than allowed, so that it cannot grow while it is read.
"""

import struct
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.masking import mask_column
from lightning_ray.spans.otlp import TooMuchError, UndecodableError
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
"""What a span from outside may be; `model_call` and `resource` are recorded by us alone."""

_OURS = (
    "role",
    "policy",
    "version",
    "continues",
    "prefix_tokens",
    "token_ids",
    "logprobs",
    "finish_reason",
)
_REQUIRED = ("span_id", "kind", "name")
_PLACE = ("run_id", "rollout_id", "attempt_id")
_TEXTS = ("name", "agent", "model", "tool")
_SCHEMA_FRAME, _BATCH_FRAME = 1, 3


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
    _check_frames(body, limits)
    try:
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            _check_columns(reader.schema)
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
        table = pa.Table.from_batches(batches, reader.schema)
        columns = [_column(table, field) for field in SPAN_SCHEMA]
    except UndecodableError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UndecodableError(f"the body is no Arrow stream of spans: {reason}") from error
    given = pa.RecordBatch.from_arrays(columns, names=SPAN_SCHEMA.names)
    given = _with_defaults(given)
    keep, refused = _judge(given, limits)
    kept = given.filter(pa.array(keep))
    return _placed(kept, place, source), refused


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


def _column(table: pa.Table, field: pa.Field) -> pa.Array:
    if field.name not in table.column_names or field.name in _PLACE:
        return pa.nulls(table.num_rows, field.type)
    return table[field.name].cast(field.type).combine_chunks()


def _with_defaults(batch: pa.RecordBatch) -> pa.RecordBatch:
    now = time.time_ns()
    columns = {name: batch[name] for name in batch.schema.names}
    columns["start_ns"] = pc.fill_null(pc.coalesce(columns["start_ns"], columns["end_ns"]), now)
    columns["end_ns"] = pc.coalesce(columns["end_ns"], columns["start_ns"])
    columns["status"] = pc.fill_null(columns["status"], SpanStatus.OK.value)
    return pa.RecordBatch.from_pydict(columns)


def _judge(batch: pa.RecordBatch, limits: TelemetryLimits) -> tuple[Mask, Counter[str]]:
    """Which rows are taken, and how many are not for each reason."""
    keep = np.ones(batch.num_rows, np.bool_)
    refused: Counter[str] = Counter()
    for reason, good in _checks(batch, limits):
        bad = keep & ~good
        if bad.any():
            refused[reason] = int(bad.sum())
            keep &= good
    return keep, refused


def _checks(batch: pa.RecordBatch, limits: TelemetryLimits) -> Iterator[tuple[str, Mask]]:
    """Reasons to refuse a row, each with the rows that it does not concern."""
    kinds = pa.array([kind.value for kind in FOREIGN_KINDS])
    statuses = pa.array([status.value for status in SpanStatus])
    yield "span_id is not 16 hexadecimal digits", _hex(batch["span_id"], 16, False)
    yield "trace_id is not 32 hexadecimal digits", _hex(batch["trace_id"], 32, True)
    yield "parent_span_id is not 16 hexadecimal digits", _hex(batch["parent_span_id"], 16, True)
    yield f"kind is none of {', '.join(kinds.to_pylist())}", _mask(pc.is_in(batch["kind"], kinds))
    yield "status is none of ok, error, aborted", _mask(pc.is_in(batch["status"], statuses))
    ours = np.zeros(batch.num_rows, np.bool_)
    for name in _OURS:
        ours |= _mask(pc.is_valid(batch[name]))
    yield f"only an engine may fill {', '.join(_OURS)}", ~ours
    yield "name is empty", _mask(pc.greater(pc.binary_length(batch["name"]), 0))
    for name in _TEXTS:
        length = pc.fill_null(pc.binary_length(batch[name]), 0)
        short = _mask(pc.less_equal(length, limits.max_value_bytes))
        yield f"{name} has more than {limits.max_value_bytes} bytes", short
    start, end = batch["start_ns"].to_numpy(), batch["end_ns"].to_numpy()
    latest = time.time_ns() + int(limits.max_clock_skew_s * 1e9)
    in_order = (start >= EARLIEST_NS) & (end <= latest) & (start <= end)
    yield "its times are before the year 2000, in the future, or in the wrong order", in_order
    reward = _mask(pc.equal(batch["kind"], SpanKind.REWARD.value))
    finite = _mask(pc.is_finite(batch["value"]))
    yield (
        "a reward needs a finite value, and nothing else has one",
        np.where(reward, finite, _mask(pc.is_null(batch["value"]))),
    )
    for name in ("step", "input_tokens", "output_tokens", "cost_usd"):
        number = pc.and_(
            pc.greater_equal(batch[name], 0), pc.is_finite(pc.cast(batch[name], pa.float64()))
        )
        yield f"{name} is not a finite number of at least 0", _mask(pc.fill_null(number, True))
    yield from _attribute_checks(batch["attributes"], limits)


def _attribute_checks(attributes: pa.Array, limits: TelemetryLimits) -> Iterator[tuple[str, Mask]]:
    length = pc.fill_null(pc.binary_length(attributes), 0)
    small = _mask(pc.less_equal(length, limits.max_span_bytes))
    yield f"attributes have more than {limits.max_span_bytes} bytes", small
    if attributes.null_count == len(attributes):
        return
    flat = pc.less_equal(depths(attributes), limits.max_depth + 1)
    yield f"attributes are nested deeper than {limits.max_depth} levels", _mask(flat)
    # What is deep or large was refused above; here it only must not be read.
    looked_at = pc.if_else(pc.and_(flat, pa.array(small)), attributes, None)
    found = query(
        pa.table({"a": looked_at}),
        "SELECT coalesce(json_valid(a), true) AS valid, CASE WHEN json_valid(a) THEN "
        "json_type(a) = 'OBJECT' AND NOT json_exists(a, '$.cost_usd') END AS good FROM spans",
    )
    yield "attributes are no JSON", _mask(found["valid"])
    yield (
        "attributes are no JSON object, or have `cost_usd`, which is a column",
        _mask(pc.fill_null(found["good"], True)),
    )


def depths(texts: pa.Array) -> pa.Array:
    """How many lists and objects lie in one another in each JSON text; 0 for null."""
    # Without the strings in it, where brackets mean nothing.
    bare = pc.replace_substring_regex(texts, pattern=r'"(?:[^"\\]|\\.)*"', replacement="")
    bare = pc.replace_substring_regex(pc.fill_null(bare, ""), pattern=r"[^\[\]{}]", replacement="")
    lengths = pc.binary_length(bare).to_numpy()
    offsets, data = (
        np.frombuffer(buffer or b"", kind)
        for buffer, kind in zip(bare.buffers()[1:], (np.int32, np.uint8), strict=True)
    )
    letters = data[offsets[bare.offset] : offsets[bare.offset + len(bare)]] if len(bare) else data
    if not len(letters):
        return pa.array(np.zeros(len(lengths), np.int64))
    opens = (letters == ord("[")) | (letters == ord("{"))
    level = np.cumsum(np.where(opens, 1, -1))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    before = np.where(starts > 0, level[np.maximum(starts - 1, 0)], 0)
    # reduceat gives the element itself where a row is empty, which is set to 0 below.
    highest = np.maximum.reduceat(level, np.minimum(starts, len(level) - 1))
    return pa.array(np.where(lengths > 0, highest - before, 0))


def _hex(column: pa.Array, digits: int, optional: bool) -> Mask:
    good = pc.match_substring_regex(column, pattern=rf"\A[0-9a-f]{{{digits}}}\z")
    zero = pc.equal(column, "0" * digits)
    return _mask(pc.fill_null(pc.and_(good, pc.invert(zero)), optional))


def _mask(array: pa.Array | pa.ChunkedArray) -> Mask:
    """As numpy; null is false."""
    mask: Mask = pc.fill_null(array, False).to_numpy(zero_copy_only=False)
    return mask.astype(np.bool_, copy=False)


def _placed(batch: pa.RecordBatch, place: tuple[str, str, str], source: str) -> pa.RecordBatch:
    rows = batch.num_rows
    columns = {name: batch[name] for name in batch.schema.names}
    for name, value in zip(_PLACE, place, strict=True):
        columns[name] = pa.repeat(pa.scalar(value, pa.string()), rows)
    columns["source"] = pa.repeat(pa.scalar(source, pa.string()), rows)
    columns["sequence"] = pa.array(np.zeros(rows, np.int64))
    for name in (*_TEXTS, "attributes"):
        columns[name] = mask_column(columns[name])
    return pa.RecordBatch.from_arrays([columns[f.name] for f in SPAN_SCHEMA], schema=SPAN_SCHEMA)


def _check_frames(body: bytes, limits: TelemetryLimits) -> None:
    """Refuses a stream that is cut, compressed, has dictionaries, or more rows than allowed.

    A compressed column says how large it will be, and Arrow believes it; so does a count of rows.
    """
    position = rows = 0
    try:
        while position < len(body):
            marker, size = struct.unpack_from("<Ii", body, position)
            if marker != 0xFFFFFFFF or size < 0:
                raise UndecodableError(
                    "the body is no Arrow IPC stream (the form of 0.15 or later)"
                )
            position += 8
            if size == 0:
                return
            message = _Table(body, position, size)
            kind = message.number(1, "<B")
            if kind not in (_SCHEMA_FRAME, _BATCH_FRAME):
                raise UndecodableError("dictionaries are not taken: write the columns plainly")
            if kind == _BATCH_FRAME:
                batch = message.table(2)
                rows += _checked_length(batch.number(0, "<q"), limits)
                if batch.has(3):
                    raise UndecodableError(
                        "compressed columns are not taken: gzip the body instead"
                    )
            length = message.number(3, "<q")
            if length < 0 or position + size + length > len(body):
                raise UndecodableError("the Arrow stream ends too early")
            position += size + length
            if rows > limits.max_spans:
                _checked_length(rows, limits)
    except struct.error as error:
        raise UndecodableError("the body is no whole Arrow IPC stream") from error


def _checked_length(rows: int, limits: TelemetryLimits) -> int:
    if not 0 <= rows <= limits.max_spans:
        raise TooMuchError(
            f"more than {limits.max_spans} spans in one request (gateway.telemetry.max_spans); "
            "send smaller batches"
        )
    return rows


class _Table:
    """A flatbuffer's table, as far as it must be known before Arrow reads it.

    (https://flatbuffers.dev/internals: offsets are relative, a vtable says where fields are.)
    """

    def __init__(self, body: bytes, start: int, size: int, position: int | None = None):
        self._body = body
        self._start = start
        self._size = size
        self._at = position if position is not None else self._follow(0)
        vtable = self._at - self._read("<i", self._at)
        self._vtable = vtable
        self._vtable_size = self._read("<H", vtable)

    def has(self, field: int) -> bool:
        """Whether a field is there."""
        return self._offset(field) != 0

    def number(self, field: int, form: str) -> int:
        """A field that is a number; 0 where it is left out."""
        offset = self._offset(field)
        return self._read(form, self._at + offset) if offset else 0

    def table(self, field: int) -> "_Table":
        """A field that is a table."""
        position = self._follow(self._at + self._offset(field))
        return _Table(self._body, self._start, self._size, position)

    def _offset(self, field: int) -> int:
        place = 4 + 2 * field
        return self._read("<H", self._vtable + place) if place < self._vtable_size else 0

    def _follow(self, position: int) -> int:
        return position + self._read("<I", position)

    def _read(self, form: str, position: int) -> int:
        if position < 0 or position + struct.calcsize(form) > self._size:
            raise UndecodableError("the body is no whole Arrow IPC stream")
        value: int = struct.unpack_from(form, self._body, self._start + position)[0]
        return value
