"""TLS contexts of forked agents take in their bundle of authorities when they are first used.

`httpx`, and with it most clients of models, makes a TLS context for every client and has it parse a
bundle of well over a hundred certificates: most of the processor time of a warm rollout, and for
nothing, because the door that an agent speaks to speaks plain HTTP.

Invariant: whoever has a context wrap a connection, or asks it what it trusts, finds what it would
have found. Put off are only files that this process has read before, while they are unchanged; what
is taken in later is what was read then, in the order in which it was asked for. Whatever else is to
be trusted is read at once.

Standard library only, and nothing newer than Python 3.9: the agent's interpreter is not ours.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from types import ModuleType
from typing import Any, Callable  # noqa: UP035

# What begins a connection; what else depends on whom a context trusts, or adds to it.
_BEGINS = ("_wrap_socket", "_wrap_bio")
_ASKS = ("cert_store_stats", "get_ca_certs", "set_default_verify_paths")

_Identity = tuple[int, int, int, int]
_Bundle = tuple[_Identity, bytes]


def put_off_reading() -> None:
    """Have contexts that are made from now on take in known bundles late; once, after the imports.

    Nothing happens where no library has imported `ssl`, where something has put another class into
    the place of its context, or where no bundle can be read.
    """
    ssl, native = sys.modules.get("ssl"), sys.modules.get("_ssl")
    if ssl is None or native is None:
        return
    for name in ("load_verify_locations", *_BEGINS, *_ASKS):
        plain = getattr(native._SSLContext, name, None)
        if plain is None or getattr(ssl.SSLContext, name, None) is not plain:
            return
    known = {}
    for path in _bundles(ssl):
        try:
            bundle = _read(ssl, path)
        except (OSError, ValueError):  # an ssl.SSLError is an OSError
            continue  # the agent is to meet it where it would have
        if bundle is not None:
            known[path] = bundle
    if known:
        _Late(ssl, known).install()


def own_frames() -> dict[str, Any]:
    """The globals of the frames of this file, which no traceback of an agent's is to show."""
    return globals()


class _Late:
    """Bundles that contexts have been told to trust and have not taken in yet."""

    def __init__(self, ssl: ModuleType, known: dict[str, _Bundle]) -> None:
        from weakref import WeakKeyDictionary, WeakSet

        self._context_type: Any = ssl.SSLContext
        self._client = ssl.PROTOCOL_TLS_CLIENT
        self._known = known
        self._load: Callable[..., None] = self._context_type.load_verify_locations
        # For each context what it is still to take in, by path, in the order of asking.
        self._due: WeakKeyDictionary[Any, dict[str, bytes]] = WeakKeyDictionary()
        # Contexts that have begun a connection.
        self._begun: WeakSet[Any] = WeakSet()
        self._new_lock()

    def install(self) -> None:
        """Take the place of the methods of `ssl.SSLContext` that it is about."""

        def load_verify_locations(
            context: Any, cafile: Any = None, capath: Any = None, cadata: Any = None
        ) -> None:
            if capath is None and cadata is None and self._can_wait(context, cafile):
                with self._lock:
                    self._due.setdefault(context, {})[cafile] = self._known[cafile][1]
            else:
                self._catch_up(context)
                self._load(context, cafile, capath, cadata)

        load_verify_locations.__doc__ = self._load.__doc__
        self._context_type.load_verify_locations = load_verify_locations
        for name in (*_BEGINS, *_ASKS):
            method = getattr(self._context_type, name)
            setattr(self._context_type, name, _After(self, method, name in _BEGINS))
        # A thread that is gone after a fork may have held it.
        os.register_at_fork(after_in_child=self._new_lock)

    def reached(self, context: Any, begins: bool) -> None:
        """A method of a context is about to be called."""
        if begins and type(context) is self._context_type:
            self._begun.add(context)
        self._catch_up(context)

    def _new_lock(self) -> None:
        self._lock = threading.RLock()

    def _can_wait(self, context: Any, path: Any) -> bool:
        # A subclass may look at what it has loaded in ways of its own, a server's context may be
        # put in another's place while a connection is being made, and one that has begun a
        # connection is asked again while that is made.
        if type(context) is not self._context_type or context.protocol is not self._client:
            return False
        if context in self._begun or type(path) is not str or path not in self._known:
            return False
        try:
            return self._known[path][0] == _identity(path)
        except OSError:
            return False

    def _catch_up(self, context: Any) -> None:
        if type(context) is not self._context_type:
            return
        # Held meanwhile: another thread's connection must not begin before all is trusted.
        with self._lock:
            for certificates in self._due.get(context, {}).values():
                self._load(context, None, None, certificates)
            self._due.pop(context, None)


class _After:
    """A method that is its plain self, once its context has caught up; no frame of ours remains."""

    def __init__(self, late: _Late, method: Any, begins: bool) -> None:
        self._late, self._method, self._begins = late, method, begins

    def __get__(self, context: Any, kind: Any = None) -> Any:
        if context is None:
            return self._method
        self._late.reached(context, self._begins)
        return self._method.__get__(context, kind)


def _bundles(ssl: ModuleType) -> list[str]:
    """The bundles that clients take unless they are told of another."""
    where = getattr(sys.modules.get("certifi"), "where", None)
    found = [ssl.get_default_verify_paths().cafile]
    # Whatever stands in its place, the agent is to meet it.
    with contextlib.suppress(Exception):
        found.append(where() if where is not None else None)
    return [path for path in found if type(path) is str]


def _read(ssl: ModuleType, path: str) -> _Bundle | None:
    """A bundle and what is to be trusted by it, in DER; None where that is not all it says."""
    identity = _identity(path)
    with open(path, "rb") as file:
        if b"BEGIN TRUSTED" in file.read():
            return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(path)
    certificates, held = context.get_ca_certs(True), context.cert_store_stats()
    if held != {"x509": len(certificates), "x509_ca": len(certificates), "crl": 0}:
        return None
    return identity, b"".join(certificates)


def _identity(path: str) -> _Identity:
    """Says whether a file is still the same one, unchanged."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
