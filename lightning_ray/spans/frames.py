"""An Arrow IPC stream, looked at before Arrow reads it.

Invariant: a stream that passes is whole, uncompressed and no longer than allowed, so that it cannot
grow while it is read.
"""

import struct

from lightning_ray.spans.limits import TelemetryLimits
from lightning_ray.spans.otlp import TooMuchError, UndecodableError

_SCHEMA_FRAME, _BATCH_FRAME = 1, 3


def check_frames(body: bytes, limits: TelemetryLimits) -> None:
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
