"""The libraries that a zygote shares with its children, and what must not be shared.

Invariant: a module is shared only if importing it early is the same as importing it in each run. It
comes from the standard library or from site-packages, never from the agent's own folders; its
import did not look at a variable that attempts set; what its import printed, each child prints.

Standard library only, and nothing newer than Python 3.9: the agent's interpreter is not ours.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Callable, Iterator  # noqa: UP035

REPORT_WAIT_MS = 2000
"""How long a report waits for its reader."""


class _WatchedEnviron(type(os.environ)):  # type: ignore[misc]
    """`os.environ` while libraries are imported: notes who reads what an attempt will set.

    A module that keeps such a value at import time would keep the wrong one, so it must be
    imported by each agent for itself. Iterating counts as reading everything.
    """

    watched: frozenset[str]
    readers: set[str]

    def __getitem__(self, key: str) -> str:
        if key in self.watched:
            self.readers.update(_modules_being_imported())
        value: str = super().__getitem__(key)
        return value

    def __iter__(self) -> Iterator[str]:
        self.readers.update(_modules_being_imported())
        return iter(super().__iter__())


def _modules_being_imported() -> list[str]:
    """Names of the modules whose bodies are running now, innermost first."""
    names = []
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "<module>" and isinstance(name, str) and name != "__main__":
            names.append(name)
        frame = frame.f_back  # type: ignore[assignment]
    return names


class Libraries:
    """Tells libraries from the agent's own modules, imports them early, and learns them."""

    def __init__(self, script: str | None) -> None:
        """Look at `sys.path` as it is before the script's own folder is added to it."""
        self._library_roots = [os.path.realpath(os.path.dirname(os.__file__))] + [
            os.path.realpath(folder)
            for folder in sys.path
            if os.path.basename(folder) in ("site-packages", "dist-packages")
        ]
        self._own_roots = [os.path.realpath(os.getcwd())]
        if script is not None:
            self._own_roots.append(os.path.dirname(os.path.realpath(script)))
        self._printed: list[tuple[int, bytes]] = []
        self.tainted: set[str] = set()
        """Modules that were imported and must not be shared."""
        self.printed: set[str] = set()
        """Modules whose import printed something, which each child prints again."""

    def preload(self, names: list[str], watched: frozenset[str]) -> dict[str, str]:
        """Import modules, in this order.

        Args:
            watched: The variables that attempts set.

        Returns:
            The modules that did not import, and why.
        """
        failed = {}
        memory = self._divert_output()
        plain = type(os.environ)
        _WatchedEnviron.watched = watched
        _WatchedEnviron.readers = self.tainted
        os.environ.__class__ = _WatchedEnviron
        said = 0
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001 - a library may raise anything; it is reported
                failed[name] = f"{type(error).__name__}: {error}"
            sys.stdout.flush()
            sys.stderr.flush()
            before, said = said, sum(os.fstat(held).st_size for _, _, held in memory)
            if said > before:
                self.printed.add(name)
        os.environ.__class__ = plain
        self._restore_output(memory)
        for name, module in list(sys.modules.items()):
            origin = _origin(name, module)
            # A library that imports a file of the agent's own belongs to the agent.
            if origin is not None and not self._is_library(origin):
                self.tainted.add(name)
        return failed

    def replay(self) -> None:
        """In a child: print what the imports printed."""
        for fd, text in self._printed:
            os.write(fd, text)

    def reporter(self, fd: int, known: frozenset[str]) -> Callable[[], None]:
        """In a child: writes the names of the imported libraries that are not known, as JSON.

        `fd` is the parent's descriptor, which the child reaches through /proc when it is called:
        where it cannot, nothing is written.
        """
        pid, parent = os.getpid(), os.getppid()

        def tell() -> None:
            if os.getpid() != pid or os.getppid() != parent:
                return
            try:
                report = os.open(f"/proc/{parent}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
            except Exception:  # noqa: BLE001 - what the agent forbids itself may raise anything
                return
            names = []
            for name, module in list(sys.modules.items()):
                origin = None if name in known else _origin(name, module)
                if origin is not None and self._is_library(origin):
                    names.append(name)
            rest = json.dumps(names).encode()
            ready = select.poll()
            ready.register(report, select.POLLOUT)
            # Nobody who does not read is waited for: a report that is cut off is none.
            with contextlib.suppress(OSError):
                while rest and ready.poll(REPORT_WAIT_MS):
                    rest = rest[os.write(report, rest) :]
            os.close(report)

        return tell

    def _divert_output(self) -> list[tuple[int, int, int]]:
        """Send stdout and stderr to memory: (descriptor, where it went before, the memory)."""
        diverted = []
        for fd in (1, 2):
            before, memory = os.dup(fd), os.memfd_create("preload")
            os.dup2(memory, fd)
            diverted.append((fd, before, memory))
        return diverted

    def _restore_output(self, diverted: list[tuple[int, int, int]]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, before, memory in diverted:
            os.dup2(before, fd)
            os.close(before)
            text = os.pread(memory, os.fstat(memory).st_size, 0)
            if text:
                self._printed.append((fd, text))
            os.close(memory)

    def _is_library(self, origin: str) -> bool:
        """Whether a module's file belongs to a library: the innermost folder that claims it says.

        An agent's folder may hold its virtual environment, and an environment may hold an agent.
        """

        def depth(roots: list[str]) -> int:
            return max((len(r) for r in roots if origin.startswith(r.rstrip("/") + "/")), default=0)

        return depth(self._library_roots) > depth(self._own_roots)


def _origin(name: str, module: object) -> str | None:
    """The real path of the file that a module came from; None where it came from no file."""
    # A module that loads itself when it is looked at is not looked at.
    if not issubclass(type(module), ModuleType):
        return None
    spec = object.__getattribute__(module, "__dict__").get("__spec__")
    if not isinstance(spec, ModuleSpec) or spec.name != name:
        return None
    if not spec.has_location or not isinstance(spec.origin, str):
        return None
    return os.path.realpath(spec.origin)
