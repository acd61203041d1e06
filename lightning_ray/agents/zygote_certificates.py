"""TLS contexts of forked agents read their bundle of authorities when they are first used.

`httpx`, and with it most clients of models, makes a TLS context for every client and has it parse a
bundle of well over a hundred certificates: most of the processor time of a warm rollout, and for
nothing, because the door that an agent speaks to speaks plain HTTP.

Invariant: whoever has a context wrap a connection, or asks it what it trusts, finds what it would
have found. Put off is only the reading of a file that this process has read before without an
error, and only while it is the same file; whatever else is to be trusted is read at once.

Standard library only, and nothing newer than Python 3.9: the agent's interpreter is not ours.
"""

from __future__ import annotations

import os
import sys
import threading
from types import ModuleType
from typing import Any, Callable  # noqa: UP035

# What a context does that depends on whom it trusts. The first two begin every connection.
_ASKS = ("_wrap_socket", "_wrap_bio", "cert_store_stats", "get_ca_certs")

_Identity = tuple[int, int, int, int]


def put_off_reading() -> None:
    """Have contexts that are made from now on read known bundles late; once, after the imports.

    Nothing happens where no library has imported `ssl`, or no bundle can be read.
    """
    ssl = sys.modules.get("ssl")
    if ssl is None or not all(hasattr(ssl.SSLContext, name) for name in _ASKS):
        return
    known = {}
    for path in _bundles(ssl):
        try:
            identity = _identity(path)
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except (OSError, ValueError):  # an ssl.SSLError is an OSError
            continue  # the agent is to meet it where it would have
        known[path] = identity
    if known:
        _Late(ssl, known).install()


class _Late:
    """Bundles that contexts have been told to trust and have not read yet."""

    def __init__(self, ssl: ModuleType, known: dict[str, _Identity]) -> None:
        # Whatever imports `ssl` has imported this; importing it earlier would show.
        from weakref import WeakKeyDictionary

        self._context_type: Any = ssl.SSLContext
        self._client = ssl.PROTOCOL_TLS_CLIENT
        self._known = known
        self._read: Callable[..., None] = self._context_type.load_verify_locations
        self._due: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
        self._new_lock()

    def install(self) -> None:
        """Take the place of the methods of `ssl.SSLContext` that it is about."""

        def load_verify_locations(
            context: Any, cafile: Any = None, capath: Any = None, cadata: Any = None
        ) -> None:
            if capath is None and cadata is None and self._can_wait(context, cafile):
                with self._lock:
                    self._due.setdefault(context, set()).add(cafile)
            else:
                self._read(context, cafile, capath, cadata)

        load_verify_locations.__doc__ = self._read.__doc__
        self._context_type.load_verify_locations = load_verify_locations
        for name in _ASKS:
            setattr(self._context_type, name, self._after_reading(name))
        # A thread that is gone after a fork may have held it.
        os.register_at_fork(after_in_child=self._new_lock)

    def _new_lock(self) -> None:
        self._lock = threading.RLock()

    def _can_wait(self, context: Any, path: Any) -> bool:
        # A subclass may look at what it has loaded in ways of its own, and a server's context may
        # be put in another's place while a connection is being made.
        if type(context) is not self._context_type or context.protocol is not self._client:
            return False
        if type(path) is not str or path not in self._known:
            return False
        try:
            return self._known[path] == _identity(path)
        except OSError:
            return False

    def _after_reading(self, name: str) -> Callable[..., Any]:
        method = getattr(self._context_type, name)

        def ask(context: Any, *args: Any, **named: Any) -> Any:
            self._catch_up(context)
            return method(context, *args, **named)

        ask.__name__, ask.__doc__ = name, method.__doc__
        return ask

    def _catch_up(self, context: Any) -> None:
        if type(context) is not self._context_type:
            return
        # Held while reading: another thread's connection must not begin before all is trusted.
        with self._lock:
            for path in self._due.get(context, ()):
                self._read(context, path)
            self._due.pop(context, None)


def _bundles(ssl: ModuleType) -> list[str]:
    """The bundles that clients take unless they are told of another."""
    certifi = sys.modules.get("certifi")
    found = [ssl.get_default_verify_paths().cafile, certifi.where() if certifi else None]
    return [path for path in found if path]


def _identity(path: str) -> _Identity:
    """Says whether a file is still the same one, unchanged."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
