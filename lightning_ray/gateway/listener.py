"""How a replica of the door hears HTTP: on a socket of its own, so that no call passes a proxy.

Ray Serve starts the replicas, watches them and replaces them. Its HTTP proxy, which would stand in
front of them, takes several times the processor time of all that the door does with a call.

Invariant: a caller who goes away ends its call, and with it what the call waits for.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

KEEP_ALIVE_S = 300
"""How long a connection without a call is kept: an agent may be at work between two."""
BACKLOG = 2048


class Listener:
    """One replica's socket and server."""

    def __init__(
        self, app: App, host: str, port: int, shared: bool, first: Awaitable[None] | None = None
    ):
        """Listens, and answers once the event loop that this is called in goes on.

        What is to be done `first` is: who comes meanwhile waits.
        `shared`: other replicas listen on the same port of this node. Raises OSError when it is
        taken.
        """
        self._socket = _listening(host, port, shared)
        # Its own log would say what the caller is told anyway.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            _EndedByCaller(app),
            http="httptools",
            proxy_headers=False,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.get_running_loop().create_task(self._serve(first))

    async def _serve(self, first: Awaitable[None] | None) -> None:
        if first is not None:
            await first
        await self._server.serve(sockets=[self._socket])

    def check(self) -> None:
        """Raises RuntimeError when it no longer listens."""
        if self._serving.done():
            raise RuntimeError("the door no longer listens")

    def close(self) -> None:
        """Stops listening; calls in flight go on for as long as the event loop does."""
        self._server.should_exit = True


def _listening(host: str, port: int, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            # Each connection then goes to one of them. Only then: it would also let another run
            # listen on a port that is taken.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


class _EndedByCaller:
    """ASGI middleware: cancels a call whose caller went away before it was answered."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        call = asyncio.current_task()
        assert call is not None
        rest: asyncio.Task[Message] | None = None
        answered = left = False

        def heard_rest(task: asyncio.Task[Message]) -> None:
            nonlocal left
            if not answered and not task.cancelled():
                left = True
                call.cancel()

        async def hear() -> Message:
            nonlocal rest
            if rest is not None:
                return await asyncio.shield(rest)
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                # Nothing follows a request but its caller's leaving.
                rest = asyncio.create_task(receive())  # type: ignore[arg-type]
                rest.add_done_callback(heard_rest)
            return message

        async def say(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered = True
            await send(message)

        try:
            await self._app(scope, hear, say)
        except asyncio.CancelledError:
            # The server would take it for a fault of ours.
            if not left:
                raise
        finally:
            if rest is not None:
                rest.cancel()
