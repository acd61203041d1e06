"""The warm process that agents are forked from; a program of its own, run by the agent's Python.

It has imported the libraries that an agent uses and nothing of the agent's own. For each rollout it
forks, and the child becomes what `python SCRIPT ARGS` would have been: same `__main__`, arguments,
environment, streams, exit status and traceback. It also starts any other command by fork and exec.

Invariants:
- It is single-threaded and shows a child no descriptor of its own, so a fork is a clean copy.
- Each child leads its own session. When the leader ends, its whole process group is killed *before*
  the leader is reaped: until then the kernel cannot give the group's number to somebody else.
- When the owner goes away, however it goes, every child's group dies and so does this process.

Started as `python zygote.py FD`, FD being a unix stream socket. Every message is four bytes of
length (big endian) and a JSON object. The first one in says what to import and is answered by
`ready`. After it, in: `run` (with the descriptors of stdout, stderr, of stdin where it has one, and
to learn of a report) and `signal`; out: `started` or `failed`, then `ended`.

Standard library only, and nothing newer than Python 3.9: the agent's interpreter is not ours.
"""

from __future__ import annotations

import sys

# What a plain script finds in `__main__`, in order, before its first line runs: this interpreter's
# own answer, whatever its version. Taken before anything else is defined here.
PLAIN_MAIN = {name: value for name, value in list(globals().items()) if name.startswith("__")}

# This file's folder must not answer imports: it has a config.py and the agent may have one too.
ADDS_SCRIPT_FOLDER = not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))
if ADDS_SCRIPT_FOLDER:
    del sys.path[0]

import ctypes  # noqa: E402
import fcntl  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import struct  # noqa: E402
import threading  # noqa: E402
from importlib.util import module_from_spec, spec_from_file_location  # noqa: E402
from typing import TYPE_CHECKING, Any, NoReturn  # noqa: E402

if TYPE_CHECKING:
    from lightning_ray.agents import zygote_certificates as certificates
    from lightning_ray.agents import zygote_child as child
    from lightning_ray.agents import zygote_libraries as libraries
    from lightning_ray.agents import zygote_limits as limits
else:

    def _sibling(name):
        """A file beside this one; neither it nor its folder is to be importable by the agent."""
        spec = spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    certificates = _sibling("zygote_certificates")
    child = _sibling("zygote_child")
    libraries = _sibling("zygote_libraries")
    limits = _sibling("zygote_limits")

# Our descriptors live from here up, so that an agent's first open() gets 3 as it does without us.
FIRST_OWN_FD = 100
# Imports that take longer than this kill the process; the owner then starts agents cold.
PRELOAD_LIMIT_S = 120
# How often to look whether the owner still lives, should the socket not tell.
OWNER_CHECK_MS = 1000
PR_SET_PDEATHSIG = 1


class Zygote:
    """Reads requests, forks children, reaps them and reports how they ended."""

    def __init__(self, control: socket.socket):
        self._control = control
        self._owner = os.getppid()
        self._scratch: str | None = None
        self._children: dict[int, int] = {}  # pid -> id of the run
        self._reports: dict[int, int] = {}  # pid -> where it says at its end what it imported
        self._watch = limits.Watch()
        self._over: dict[int, tuple[str, int]] = {}  # pid -> the limit, and how much it held
        self._script_env: dict[bytes, bytes] = {}
        self._shared: frozenset[str] = frozenset()
        self._shared_files: list[Any] = []
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare(self) -> None:
        """Obey the first message: import the libraries that it names, and say `ready`."""
        message, _ = self._receive()
        self._scratch = message["scratch"]
        # What this interpreter put into its environment by itself (PEP 538) it would put there
        # again for each agent.
        given = _raw_env(message["env"])
        self._script_env = {k: v for k, v in os.environb.items() if k not in given}
        script, names = message["script"], message["preload"]
        script = None if script is None else os.fsdecode(_raw(script))
        self._libraries = libraries.Libraries(script)
        if script is not None:
            sys.argv = [script]
            if ADDS_SCRIPT_FOLDER:
                sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
        failed: dict[str, str] = {}
        if names:
            signal.alarm(PRELOAD_LIMIT_S)
            failed = self._libraries.preload(names, frozenset(message["watch"]))
            certificates.put_off_reading()
            signal.alarm(0)
        ready = {
            "event": "ready",
            "failed": failed,
            "tainted": sorted(self._libraries.tainted),
            "printed": sorted(self._libraries.printed),
            "threads": max(threading.active_count(), self._threads_lost_by_forking()),
        }
        # Nothing imported so far is ever collected again: a collection would touch, and so copy,
        # every page that the children share.
        gc.collect()
        self._shared_files = child.open_files()
        gc.freeze()
        if names:
            self._shared = frozenset(sys.modules)
        self._tell(ready)

    def _threads_lost_by_forking(self) -> int:
        """Native threads that a fork would lose, plus one. A pool that stops for a fork is fine."""
        if not os.path.isdir("/proc/self/task"):
            return 1
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return len(os.listdir("/proc/self/task"))

    def serve(self) -> child.Job:
        """Serve the owner until it goes away. Returns only in a forked child, with its job."""
        self._wakeup, wakeup_in = (_own_fd(fd) for fd in os.pipe())
        os.set_blocking(wakeup_in, False)
        os.set_blocking(self._wakeup, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_in, warn_on_full_buffer=False)
        self._private_fds = [self._control.fileno(), self._wakeup, wakeup_in]
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(self._watch.wait_ms(OWNER_CHECK_MS))]
            if os.getppid() != self._owner:
                self._abandon()
            if self._wakeup in ready:
                os.read(self._wakeup, 4096)
            self._reap()
            for pid, limit, held in self._watch.over():
                self._over[pid] = (limit, held)
                self._watch.remove(pid)
                _kill_group(pid, signal.SIGKILL)
            if self._control.fileno() in ready:
                message, fds = self._receive()
                if message["op"] == "signal":
                    self._signal(message["id"], message["signal"])
                    continue
                job = self._run(message, fds)
                if job is not None:
                    return job

    def _run(self, message: dict[str, Any], fds: list[int]) -> child.Job | None:
        """Start one run and tell the owner; in the forked child, return its job."""
        zygote = os.getpid()
        stdin = fds.pop(2) if message["stdin"] else None
        report = _own_fd(fds.pop(2)) if len(fds) > 2 else None
        # Closed by a successful exec, so that reading it to its end waits for no longer than that.
        error_out, error_in = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            pid = -1
            os.write(error_in, f"fork: {error}".encode())
        if pid == 0:
            os.close(error_out)
            self._enter_child(zygote, fds, stdin, report)
            if not message["fork"]:
                _execute(message["path"], message["argv"], message["env"], error_in)
            os.close(error_in)
            self._libraries.replay()
            return child.Job(
                [os.fsdecode(_raw(word)) for word in message["argv"]],
                message["script"],
                {**_raw_env(message["env"]), **self._script_env},
                self._shared,
                self._shared_files,
                None if report is None else self._libraries.reporter(report, self._shared),
            )
        for fd in (*fds, error_in, *(() if stdin is None else (stdin,))):
            os.close(fd)
        error_text = b"" if message["fork"] and pid > 0 else _read_to_end(error_out)
        os.close(error_out)
        if error_text:
            if pid > 0:
                os.waitpid(pid, 0)
            if report is not None:
                os.close(report)
            reason = error_text.decode("utf-8", "replace")
            self._tell({"event": "failed", "id": message["id"], "error": reason})
            return None
        self._children[pid] = message["id"]
        if report is not None:
            self._reports[pid] = report
        self._watch.add(pid, message["max_memory"], message["max_processes"])
        self._tell({"event": "started", "id": message["id"], "pid": pid})
        return None

    def _enter_child(
        self, zygote: int, fds: list[int], stdin: int | None, report: int | None
    ) -> None:
        """Cut the child loose: own session, plain signals, its streams, none of our descriptors."""
        os.setsid()
        if self._prctl is not None:
            self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != zygote:
                os._exit(127)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Where it reports is opened again when it does: meanwhile the agent would find it.
        for fd in (*self._private_fds, *self._reports.values(), report):
            if fd is not None:
                os.close(fd)
        self._control.detach()
        if stdin is not None:
            os.dup2(stdin, 0)
            os.close(stdin)
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        os.close(fds[0])
        os.close(fds[1])

    def _signal(self, run: int, number: int) -> None:
        """Send a signal to the group of a run, if it has not ended."""
        for pid, other in self._children.items():
            if other == run:
                _kill_group(pid, number)

    def _reap(self) -> None:
        """Report the children that ended, each with nothing left of its group."""
        for pid in list(self._children):
            if hasattr(os, "waitid"):
                flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                if os.waitid(os.P_PID, pid, flags) is None:
                    continue
                _kill_group(pid, signal.SIGKILL)
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended == 0:
                continue
            if not hasattr(os, "waitid"):  # macOS; the number could in theory be somebody else's
                _kill_group(pid, signal.SIGKILL)
            run = self._children.pop(pid)
            report = self._reports.pop(pid, None)
            if report is not None:
                os.close(report)
            cpu = usage.ru_utime + usage.ru_stime
            self._watch.remove(pid)
            over = self._over.pop(pid, None)
            ended_event = {"event": "ended", "id": run, "status": status, "cpu_seconds": cpu}
            self._tell({**ended_event, "over": over})

    def _abandon(self) -> NoReturn:
        """The owner is gone: take everything down."""
        for pid in self._children:
            _kill_group(pid, signal.SIGKILL)
        if self._scratch is not None:
            _remove(self._scratch)
        os._exit(0)

    def _tell(self, message: dict[str, Any]) -> None:
        payload = json.dumps(message).encode()
        try:
            self._control.sendall(struct.pack("!I", len(payload)) + payload)
        except (BrokenPipeError, ConnectionResetError):
            self._abandon()

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and the descriptors that came with it."""
        fds: list[int] = []
        data = b""
        wanted = 4
        size = None
        while len(data) < wanted:
            try:
                chunk, ancillary, _, _ = self._control.recvmsg(
                    wanted - len(data), socket.CMSG_SPACE(4 * struct.calcsize("i"))
                )
            except ConnectionResetError:
                self._abandon()
            if not chunk:
                self._abandon()
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds += struct.unpack(f"{len(content) // struct.calcsize('i')}i", content)
            data += chunk
            if size is None and len(data) == 4:
                size = struct.unpack("!I", data)[0]
                data, wanted = b"", size
        message: dict[str, Any] = json.loads(data)
        return message, fds


def _remove(folder: str) -> None:
    """Remove a folder and what is in it, as far as that can be done."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            _remove_one(os.path.join(place, name))
    _remove_one(folder)


def _remove_one(path: str) -> None:
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        pass  # nobody is left to be told


def _own_fd(fd: int) -> int:
    """Move a descriptor out of the agent's way."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_OWN_FD)
    os.close(fd)
    return moved


def _read_to_end(fd: int) -> bytes:
    """All that comes out of a pipe until its last writer has closed it."""
    parts: list[bytes] = []
    while True:
        part = os.read(fd, 4096)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _kill_group(leader: int, number: int) -> None:
    """Signal the group of a child that is not reaped yet, or the child where it has none yet."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        os.kill(leader, number)
    except PermissionError:
        pass  # macOS answers so for a group of which only a zombie is left


def _raw(text: str) -> bytes:
    """The bytes of an argument: the owner's encoding is UTF-8, the agent's may be another."""
    return text.encode("utf-8", "surrogateescape")


def _raw_env(env: dict[str, str]) -> dict[bytes, bytes]:
    return {_raw(name): _raw(value) for name, value in env.items()}


def _execute(path: str, argv: list[str], env: dict[str, str], error_in: int) -> NoReturn:
    """Become another program, or write to `error_in` why not."""
    try:
        # Python ignores these two; other programs expect the default.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if hasattr(signal, "SIGXFSZ"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.execve(_raw(path), [_raw(word) for word in argv], _raw_env(env))
    except (OSError, ValueError) as error:
        os.write(error_in, f"{path}: {error}".encode("utf-8", "replace"))
    finally:
        os._exit(127)


def main() -> child.Job:
    """Serve until the owner goes away; in each forked child, return what it has to become."""
    # The owner's own dispositions are not the agent's business.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    zygote = Zygote(socket.socket(fileno=_own_fd(int(sys.argv[1]))))
    zygote.prepare()
    return zygote.serve()


if __name__ == "__main__":
    _path, _ending = child.become(main(), PLAIN_MAIN)
    try:
        _code = compile(child.read_script(_path), _path, "exec", dont_inherit=True)
        exec(_code, vars(sys.modules["__main__"]))
        child.forget_file()
        _ending.code = 0
    except SystemExit as error:
        _ending.code = child.exit_code(error)
        raise
    except BaseException:
        child.hide_own_frames([globals(), certificates.own_frames()], _ending)
        raise
