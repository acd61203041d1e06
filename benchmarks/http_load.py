"""A load of concurrent agents, each asking again once it is answered; a process of its own.

Takes one request a line on standard input, a JSON object of the fields of `Load`, and answers each
with one JSON object a line on standard output. Each agent has one connection, which it keeps.
"""

import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.http_wire import Messages

LIMIT_S = 240.0
"""Longest that one load may take."""


@dataclass(frozen=True)
class Load:
    """What is asked, by how many, for how long."""

    urls: list[str]
    """Agent N asks the Nth of them, from the beginning again where they are fewer."""
    bodies: list[str]
    """The Nth request of all has the Nth of them, likewise."""
    clients: int
    seconds: float = 0.0
    """What ends in this time is counted; 0 where a number of requests is given."""
    warm_s: float = 0.0
    """How long they ask before that."""
    requests: int = 0
    """All of them are counted."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Agent N sends the Nth of them with each request, likewise."""
    same: bool = True
    """Whether each reply must be, byte for byte, what the first one was."""


class Connection(Messages):
    """One agent's connection: a request at a time."""

    def __init__(self) -> None:
        super().__init__(self._answered, self._lost)
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None

    async def ask(self, data: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer. Raises ConnectionError when there will be none."""
        if self.transport.is_closing():
            raise ConnectionError("the server closed a connection that was to be kept")
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return await self._answer

    def _answered(self, _: Messages, head: bytes, body: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((head, body))

    def _lost(self, _: Messages) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed before the answer was whole"))


class Run:
    """One load under way."""

    def __init__(self, load: Load):
        self._load = load
        self._asked = 0
        self.seconds: list[float] = []
        self._late: list[tuple[float, float]] = []
        """When calls ended after the time was over, and what they took."""
        self.replies: list[bytes] = []

    async def measure(self) -> dict[str, Any]:
        """What came of it. Raises RuntimeError when a reply was no success, or another one."""
        load = self._load
        connections = [await self._connect(number) for number in range(load.clients)]
        self._from = time.perf_counter() + load.warm_s
        self._until = self._from + load.seconds if load.seconds else float("inf")
        try:
            async with asyncio.TaskGroup() as group:
                for number, connection in enumerate(connections):
                    group.create_task(self._agent(number, connection))
        finally:
            for connection in connections:
                connection.transport.close()
        took = load.seconds or time.perf_counter() - self._from
        if len(self.seconds) < 2 and self._late:
            # So slow a server is measured by what it had been asked when the time was over.
            took = self._late[-1][0] - self._from
            self.seconds += [seconds for _, seconds in self._late]
        if len(self.seconds) < 2:
            raise RuntimeError(f"{len(self.seconds)} replies within {took:g} s")
        cuts = statistics.quantiles(self.seconds, n=100, method="inclusive")
        return {
            "units": len(self.seconds),
            "seconds": took,
            "p50_ms": statistics.median(self.seconds) * 1000,
            "p99_ms": cuts[98] * 1000,
            "replies": [one.decode() for one in self.replies],
        }

    async def _connect(self, number: int) -> Connection:
        parts = urlsplit(self._load.urls[number % len(self._load.urls)])
        host, port = parts.netloc.rsplit(":", 1)
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(Connection, host, int(port))
        return made

    async def _agent(self, number: int, connection: Connection) -> None:
        load = self._load
        requests = _requests(load, number)
        while (begin := time.perf_counter()) < self._until:
            if load.requests and self._asked >= load.requests:
                return
            index = self._asked
            self._asked += 1
            head, body = await connection.ask(requests[index % len(requests)])
            end = time.perf_counter()
            self._check(head, body)
            if begin < self._from:
                continue
            if end <= self._until:
                self.seconds.append(end - begin)
            else:
                self._late.append((end, end - begin))

    def _check(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"http/1.1 200 "):
            raise RuntimeError(f"{head.splitlines()[0].decode()}: {body[:300]!r}")
        if not self._load.same or not self.replies:
            self.replies.append(body)
        elif body != self.replies[0]:
            raise RuntimeError(f"another reply: {body[:300]!r}")


def _requests(load: Load, agent: int) -> list[bytes]:
    parts = urlsplit(load.urls[agent % len(load.urls)])
    headers = {"content-type": "application/json"}
    if load.headers:
        headers |= load.headers[agent % len(load.headers)]
    made = []
    for body in load.bodies:
        lines = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        data = body.encode()
        head = "\r\n".join([*lines, f"content-length: {len(data)}"])
        made.append(head.encode() + b"\r\n\r\n" + data)
    return made


async def measured(load: Load) -> dict[str, Any]:
    """What came of a load, within LIMIT_S."""
    async with asyncio.timeout(LIMIT_S):
        return await Run(load).measure()


def main() -> None:
    """Answers requests until standard input ends."""
    run: Any = asyncio.run
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        pass
    print(json.dumps({"ready": ""}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(measured(Load(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main()
