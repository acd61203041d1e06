"""Check digits of a record batch on disk, and mending a byte that has changed.

Invariant: what passes `verify` is what was written, but for an error that both CRC-32 and Adler-32
miss; what `mend` returns passes it too. A single changed byte is always found and put right.

The digits stand in the batch's own IPC message, as custom metadata that any Arrow reader ignores;
they are computed over the whole message with zeros in their place.
"""

import zlib
from collections.abc import Callable
from functools import cache

KEY = b"lightning_ray.check"
_MARK = b"crc32+adler32:"
_DIGITS = 16
_ZEROS = b"0" * _DIGITS
PLACEHOLDER = {KEY: _MARK + _ZEROS}
"""Metadata to write a batch with; `seal` puts the digits into the message."""

MEND_LIMIT = 16 * 1024 * 1024
"""Messages larger than this are not mended: the search costs about 0.1 s for each MiB."""


def seal(message: memoryview) -> tuple[int, bytes]:
    """Where in the message the check digits belong, and the digits.

    Raises ValueError for a message that was not written with `PLACEHOLDER`.
    """
    place = _place(message)
    if place is None:
        raise ValueError("the message has no place for check digits")
    return place, b"%08x%08x" % (zlib.crc32(message), zlib.adler32(message))


def verify(message: memoryview) -> bool | None:
    """Whether the message is as it was written; None for one that has no check digits."""
    place = _place(message)
    if place is None:
        return None
    crc, adler = _expected(message, place)
    # Either sum says that the message is whole: damage to the digits themselves spoils only one.
    return _sum(zlib.crc32, message, place, 0) == crc or (
        _sum(zlib.adler32, message, place, 1) == adler
    )


def mend(message: memoryview) -> tuple[int, int] | None:
    """The (position, value) of one byte whose change makes the message what was written.

    None when no single byte does, or the message is larger than `MEND_LIMIT`.
    """
    if len(message) > MEND_LIMIT:
        return None
    # The byte may lie in the mark before the digits, so every likely place is tried.
    for place in _likely_places(message):
        crc, adler = _expected(message, place)
        if crc is None or adler is None:
            continue
        if (found := _search(message, place, crc, adler)) is not None:
            return found
    return None


def _search(message: memoryview, place: int, crc: int, adler: int) -> tuple[int, int] | None:
    # CRC-32 is linear: the two sums differ by the sum of the error pattern alone. One wrong byte
    # with n bytes behind it gives a table entry that n zero bytes were fed to; undoing them one at
    # a time must meet that entry (Peterson and Brown, "Cyclic Codes for Error Detection", 1961).
    table, undo = _tables()
    errors = {entry: byte for byte, entry in enumerate(table)}
    syndrome = crc ^ _sum(zlib.crc32, message, place, 0)
    for position in range(len(message) - 1, -1, -1):
        error = errors.get(syndrome)
        if error is not None and not place <= position < place + _DIGITS:
            value = message[position] ^ error
            repaired = bytearray(message)
            repaired[position] = value
            if _sum(zlib.adler32, memoryview(repaired), place, 1) == adler:
                return position, value
        low = undo[syndrome >> 24]
        syndrome = ((syndrome ^ table[low]) << 8 & 0xFFFFFFFF) | low
    return None


@cache
def _tables() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """CRC-32's table (reflected, polynomial 0xEDB88320), and its index by the entry's top byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0xEDB88320 if byte & 1 else 0)
        table.append(byte)
    undo = [0] * 256
    for byte, entry in enumerate(table):
        undo[entry >> 24] = byte
    return tuple(table), tuple(undo)


def _place(message: memoryview) -> int | None:
    """Where the digits begin. The mark stands in the head of the message, before its body."""
    head = int.from_bytes(message[4:8], "little") + 8 if len(message) >= 8 else 0
    found = bytes(message[: min(head, len(message))]).find(_MARK)
    if found < 0 or found + len(_MARK) + _DIGITS > len(message):
        return None
    return found + len(_MARK)


def _likely_places(message: memoryview) -> list[int]:
    raw = bytes(message)
    places = []
    # Half of the mark is enough: only one byte is wrong.
    for part, before in ((_MARK[:7], 0), (_MARK[7:], 7)):
        start = -1
        while (start := raw.find(part, start + 1)) >= 0:
            place = start - before + len(_MARK)
            if 0 <= place <= len(raw) - _DIGITS and place not in places:
                places.append(place)
    return places


def _expected(message: memoryview, place: int) -> tuple[int | None, int | None]:
    digits = bytes(message[place : place + _DIGITS])
    return _number(digits[:8]), _number(digits[8:])


def _number(digits: bytes) -> int | None:
    try:
        return int(digits, 16)
    except ValueError:
        return None


def _sum(
    checksum: Callable[[bytes | memoryview, int], int], message: memoryview, place: int, start: int
) -> int:
    """A checksum of the message with zeros for its check digits."""
    total = checksum(message[:place], start)
    total = checksum(_ZEROS, total)
    return checksum(message[place + _DIGITS :], total)
