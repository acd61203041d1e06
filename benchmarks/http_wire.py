"""As much of HTTP/1.1 as a load needs: messages with a length or in chunks, on kept connections.

Made to take little time a message: on a few cores, what the client and the upstream use is not
there for the gateway.
"""

import asyncio
from collections.abc import Callable
from typing import cast

HEAD_END = b"\r\n\r\n"


class Messages(asyncio.Protocol):
    """One connection: cuts what comes into whole messages, and hands on each head and body."""

    transport: asyncio.Transport

    def __init__(
        self,
        take: Callable[["Messages", bytes, bytes], None],
        gone: Callable[["Messages"], None] | None = None,
    ):
        """`take(connection, head, body)` gets each head in lower case; `gone` hears of the end."""
        self._take = take
        self._gone = gone
        self._buffer = b""
        self._head: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio.Protocol."""
        if self._gone is not None:
            self._gone(self)

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        self._buffer += data
        while True:
            if self._head is None:
                head, found, rest = self._buffer.partition(HEAD_END)
                if not found:
                    return
                self._head, self._buffer = head.lower(), rest
            cut = body_of(self._head, self._buffer)
            if cut is None:
                return
            head, self._head = self._head, None
            body, self._buffer = cut
            self._take(self, head, body)


def body_of(head: bytes, data: bytes) -> tuple[bytes, bytes] | None:
    """The body at the beginning of `data`, and what follows it; None while some is missing."""
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        size = int(head[at + 17 :].split(b"\r\n", 1)[0])
        return (data[:size], data[size:]) if len(data) >= size else None
    if b"\r\ntransfer-encoding: chunked" in head:
        return _unchunked(data)
    return b"", data


def _unchunked(data: bytes) -> tuple[bytes, bytes] | None:
    parts: list[bytes] = []
    at = 0
    # A body that is not whole is gone through again with the next piece: there are few pieces.
    while (end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:end].split(b";", 1)[0], 16)
        begin = end + 2
        at = begin + size + 2
        if len(data) < at:
            return None
        if size == 0:
            return b"".join(parts), data[at:]
        parts.append(data[begin : begin + size])
    return None
