"""Nothing outlives the job: a small process that clears a local cluster away when its driver dies.

A driver that is killed cannot stop what it started. The guardian holds the other end of a pipe to
it; when that end closes without a farewell, it kills the processes that it was told of and all
their descendants. It imports nothing but psutil and the standard library.
"""

import json
import os
import select
import signal
import subprocess
import sys

import psutil

FAREWELL = "farewell"
LOOK_EVERY_S = 5.0


class Guardian:
    """The driver's side."""

    def __init__(self) -> None:
        """Starts the guardian, in a session of its own: Ctrl-C at the terminal is not for it."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def watch(self, processes: list[psutil.Process]) -> None:
        """Names the processes that must not outlive this one, with their descendants."""
        known = [(process.pid, process.create_time()) for process in processes]
        self._say(json.dumps(known))

    def dismiss(self, timeout_s: float = 5.0) -> None:
        """The driver has cleared away by itself."""
        try:
            self._say(FAREWELL)
            self._process.wait(timeout_s)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(timeout_s)

    @property
    def pid(self) -> int:
        """The guardian's process id."""
        return self._process.pid

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def _family(known: set[psutil.Process]) -> set[psutil.Process]:
    """Those of the known processes that live, and their descendants."""
    family = set()
    for process in known:
        try:
            # psutil compares start times: a process that took over a pid is another process.
            if process.is_running():
                family |= {process, *process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return family


def _named(line: str) -> set[psutil.Process]:
    """The processes that the driver named, those that are still who they were."""
    named = set()
    for pid, created in json.loads(line):
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            continue
        if process.create_time() == created:
            named.add(process)
    return named


def _guard() -> None:
    # Only the pipe says that the driver is gone; it may be stopping by itself after a Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    roots: set[psutil.Process] = set()
    family: set[psutil.Process] = set()
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], LOOK_EVERY_S)
        if ready:
            piece = os.read(0, 65536)
            if not piece:
                break
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                if line.decode() == FAREWELL:
                    return
                roots = _named(line.decode())
        # Looked up while the roots live: Ray's own daemons may die with the driver, and what they
        # leave behind has no parent to be found by.
        family = _family(roots | family)
    for process in _family(roots | family) | family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    _guard()
