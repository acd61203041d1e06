"""The forked child of a zygote: becoming a fresh interpreter, and ending like one.

Invariant: the agent's script finds what `python SCRIPT ARGS` would have shown it, and leaves behind
what that would have left: exit status, traceback, exit handlers run, threads joined, files flushed,
its objects finalised. The one thing left out is taking apart the libraries that all children share,
which would copy every page of them to free memory that the kernel frees anyway.

Standard library only, and nothing newer than Python 3.9: the agent's interpreter is not ours.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import sys
from types import ModuleType, TracebackType
from typing import Any, Callable  # noqa: UP035


class Job:
    """What a forked child has to become: everything that differs from the zygote it came from."""

    def __init__(
        self,
        argv: list[str],
        script: int,
        env: dict[bytes, bytes],
        shared: frozenset[str],
        shared_files: list[Any],
        report: Callable[[], None] | None = None,
    ):
        self.argv = argv
        """The command line, interpreter first."""
        self.script = script
        """Where in `argv` the script stands."""
        self.env = env
        """The complete environment."""
        self.shared = shared
        """Modules that were imported for all children; empty where the child does its own."""
        self.shared_files = shared_files
        """Files that were open before the fork."""
        self.report = report
        """Tells what was imported; called once the agent's own exit handlers have run."""


def become(job: Job, plain_main: dict[str, Any]) -> tuple[str, Ending]:
    """Make this child look like a fresh interpreter that is about to run the job's script.

    Args:
        plain_main: What a script finds in `__main__` before its first line.

    Returns:
        The script's path as Python would show it, and how this process is to end.
    """
    # Registered before the agent can register anything, so it comes after all of that.
    ending = Ending(job)
    if job.shared:
        atexit.register(ending.finish)
    if job.report is not None:
        atexit.register(job.report)
    os.environb.clear()
    os.environb.update(job.env)
    script = job.argv[job.script]
    sys.argv = job.argv[job.script :]
    if hasattr(sys, "orig_argv"):
        sys.orig_argv = list(job.argv)
    # `random` reseeds itself after a fork; numpy's global generator does not.
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    path = os.path.join(os.getcwd(), script)
    main = ModuleType("__main__")
    namespace = vars(main)
    namespace.update(plain_main)
    namespace["__doc__"] = None
    namespace["__file__"] = path
    namespace["__loader__"] = type(plain_main["__loader__"])("__main__", path)
    if "__annotations__" in plain_main:
        namespace["__annotations__"] = {}
    sys.modules["__main__"] = main
    return path, ending


def read_script(path: str) -> bytes:
    """The script's source; where it cannot be read, ends as Python would."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        sys.stderr.write(f"{sys.executable}: can't open file {path!r}: {reason}\n")
        sys.exit(2)


def hide_own_frames(own: list[dict[str, Any]], ending: Ending) -> None:
    """Have the exception that is about to end the program printed without our own frames.

    It goes on to the interpreter's top level, which prints it, runs the exit handlers and picks
    the exit status, exactly as without us.

    Args:
        own: The globals of our files whose frames stand above the agent's, or below them.
    """
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = hook
        seen: set[int] = set()
        others: list[BaseException | None] = [error]
        while others:
            other = others.pop()
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                others += [other.__cause__, other.__context__]
                other.__traceback__ = _without(other.__traceback__, own)
        trace = sys.last_traceback = error.__traceback__
        hook(kind, error, trace)
        forget_file()
        # An interrupt ends the process by its signal, which is the interpreter's to do.
        if not issubclass(kind, KeyboardInterrupt):
            ending.code = 1

    sys.excepthook = show


def _without(trace: TracebackType | None, own: list[dict[str, Any]]) -> TracebackType | None:
    """A traceback without the frames of some files."""
    kept: list[TracebackType] = []
    while trace is not None:
        if not any(trace.tb_frame.f_globals is those for those in own):
            kept.append(trace)
        trace = trace.tb_next
    for one, following in zip(kept, [*kept[1:], None]):  # noqa: B905 - not in Python 3.9
        one.tb_next = following
    return kept[0] if kept else None


def forget_file() -> None:
    """What the interpreter does to `__main__` when the script is through, unless it called exit."""
    for name in ("__file__", "__cached__"):
        vars(sys.modules["__main__"]).pop(name, None)


def exit_code(error: SystemExit) -> int | None:
    """The exit status that Python gives for it; None where that is better left to Python."""
    if error.code is None:
        return 0
    if not isinstance(error.code, int):
        return 1
    return error.code & 0xFF if -(1 << 31) <= error.code < 1 << 31 else None


class Ending:
    """The end of a child, once threads are joined and the agent's exit handlers have run."""

    def __init__(self, job: Job) -> None:
        self._shared = job.shared
        self._shared_files = job.shared_files
        self._libc = ctypes.CDLL(None) if job.shared else None
        self.code: int | None = None
        """The exit status; while it is not known, the interpreter ends in its own, slower way."""

    def finish(self) -> None:
        """Finalise what is the agent's, flush every file, and exit.

        Follows the interpreter's order: reset `sys`, forget the modules, collect while their
        globals are intact.
        """
        if self.code is None or self._libc is None:
            return
        if len(sys._current_frames()) > 1:
            return  # daemon threads are the interpreter's to stop
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None and not stream.closed:
                    stream.flush()
        except (OSError, ValueError, AttributeError):
            return  # the interpreter reports it, and picks another exit status
        for name in ("path", "argv", "path_hooks", "path_importer_cache", "meta_path"):
            setattr(sys, name, None)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        # A collection finalises in no good order: a file's buffer may go before its text.
        _flush(open_files())
        own = {name for name in sys.modules if name not in self._shared} | {"__main__"}
        # Held, so that the shared ones are not taken apart.
        kept = [module for name, module in sys.modules.items() if name not in own]
        sys.modules.clear()
        atexit._clear()
        gc.collect()
        _flush(open_files())
        _flush(self._shared_files)
        self._libc.fflush(None)
        del kept
        os._exit(self.code)


def open_files() -> list[Any]:
    """All files that may hold unwritten text or bytes, text first; frozen objects not included."""
    things = gc.get_objects()
    return [
        thing
        for kind in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
        for thing in things
        # Not isinstance: a proxy may answer for what it stands for, and load it.
        if issubclass(type(thing), kind)
    ]


def _flush(files: list[Any]) -> None:
    """Write out what files still hold; one that is closed or cannot take it is left alone."""
    for file in files:
        # Whatever the interpreter would say of it, it says when the file is finalised.
        with contextlib.suppress(OSError, ValueError):
            if not file.closed:
                file.flush()
