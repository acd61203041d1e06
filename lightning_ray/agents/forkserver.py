"""The owner's side of a zygote: starts it, hands it runs, bounds them, notices its death.

Invariant: when `run` returns or raises, its process group is gone or has been told to go, and no
pipe of it is left open here. A run whose zygote died ends as LAUNCH_FAILED, never as the agent's
failure.
"""

import asyncio
import itertools
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ray.agents.capture import Capture
from lightning_ray.agents.job import Job
from lightning_ray.agents.result import AgentEnd, AgentResult
from lightning_ray.errors import InfrastructureError

_log = logging.getLogger(__name__)

ZYGOTE = Path(__file__).with_name("zygote.py")
# Between the request to stop and the order to.
TERM_GRACE_S = 2.0
# A killed group ends at once; a zygote that does not say so by then is lost.
KILL_WAIT_S = 10.0
# After the group is gone, only a process that left it can hold the pipes: do not wait for that one.
DRAIN_S = 1.0
# Longer than zygote.PRELOAD_LIMIT_S, which ends a hanging import first.
READY_LIMIT_S = 130.0
_REPORT_LIMIT = 1 << 24


@dataclass(frozen=True)
class Readiness:
    """What a zygote says once its imports are done."""

    failed: dict[str, str]
    """Modules that did not import, and why."""
    tainted: list[str]
    """Modules that must not be shared: they read what each attempt sets, or are the agent's own."""
    printed: list[str]
    """Modules that printed when they were imported; each run prints that again."""
    threads: int
    """Threads that a fork would lose, plus one: more than 1 means that forking is not safe."""


class ForkServer:
    """One zygote process and the runs that it holds."""

    def __init__(
        self,
        interpreter: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        script: str | None = None,
        preload: Sequence[str] = (),
        watch: Sequence[str] = (),
        scratch: Path | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            interpreter: The Python to run the zygote with, and its flags.
            env: The zygote's environment: what all of its runs share.
            cwd: The folder of every run.
            script: The script that `fork` jobs run, as their command names it.
            preload: Modules to import beforehand, in this order.
            watch: Variables that differ between runs.
            scratch: A folder that the zygote removes should this process die.
        """
        self._command = [*interpreter, str(ZYGOTE)]
        self._env = dict(env)
        self._cwd = cwd
        self._first = {
            "env": self._env,
            "script": script,
            "preload": list(preload),
            "watch": list(watch),
            "scratch": None if scratch is None else str(scratch),
        }
        self.preloaded = bool(preload)
        self._ids = itertools.count()
        self._runs: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pids: dict[int, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._output: list[Capture] = []
        self._outbox: asyncio.Queue[tuple[dict[str, Any], tuple[int, ...]]] = asyncio.Queue()
        self._process: subprocess.Popen[bytes] | None = None
        self.alive = False
        """Whether runs can be handed to it."""
        self._closing = False
        self._stopped: set[int] = set()

    async def start(self) -> Readiness:
        """Start the zygote and wait for its imports.

        Raises:
            InfrastructureError: it cannot be started, or ends or hangs before it is ready.
        """
        self._loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        self._output = [Capture(1 << 16), Capture(1 << 16)]
        out, err = (capture.write_fd for capture in self._output)
        try:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[theirs.fileno()],
                # Ctrl-C at the terminal is the owner's to handle.
                start_new_session=True,
            )
        except OSError as error:
            self._control.close()
            for capture in self._output:
                capture.close()
            raise InfrastructureError(f"cannot start {self._command[0]}: {error}") from error
        finally:
            theirs.close()
            os.close(out)
            os.close(err)
        self.alive = True
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._tasks = [self._loop.create_task(self._read()), self._loop.create_task(self._write())]
        self._send(self._first)
        try:
            await asyncio.wait({self._ready}, timeout=READY_LIMIT_S)
        except asyncio.CancelledError:
            await self.close()
            raise
        if not self._ready.done():
            self._lost("its imports take too long")
        message = self._ready.result()
        if message["event"] != "ready":
            await self.close()
            last = self._output[1].text.strip().splitlines()[-1:]
            raise InfrastructureError(f"{' '.join(self._command)}: {message['error']} {last}")
        return Readiness(
            message["failed"], message["tainted"], message["printed"], message["threads"]
        )

    async def run(self, job: Job, timeout_s: float, max_output_bytes: int) -> AgentResult:
        """Run a job to its end.

        Cancelling this kills the job's process group before the cancellation goes on.
        """
        result, _ = await self._run(job, timeout_s, max_output_bytes, learn=False)
        return result

    async def learn(
        self, job: Job, timeout_s: float, max_output_bytes: int
    ) -> tuple[AgentResult, list[str] | None]:
        """Run a `fork` job, and name the libraries that it imported, in their order.

        Those that were there before it began are not named. None where it ended too abruptly to
        tell.
        """
        result, report = await self._run(job, timeout_s, max_output_bytes, learn=True)
        with suppress(ValueError):  # cut off: as good as none
            names: list[str] = json.loads(report)
            return result, names
        return result, None

    async def _run(
        self, job: Job, timeout_s: float, max_output_bytes: int, learn: bool
    ) -> tuple[AgentResult, bytes]:
        run_id = next(self._ids)
        ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        started_at = time.monotonic()
        limits = [max_output_bytes, max_output_bytes, *([_REPORT_LIMIT] if learn else [])]
        stdin = () if job.stdin is None else (job.stdin_fd(),)
        captures = [Capture(limit) for limit in limits]
        timed_out = False
        try:
            self._runs[run_id] = ended
            fds = (*(capture.write_fd for capture in captures[:2]), *stdin)
            fds += tuple(capture.write_fd for capture in captures[2:])
            message = {"op": "run", "id": run_id, **job.message()}
            self._send(message, fds)
            try:
                await asyncio.wait({ended}, timeout=timeout_s)
                if not ended.done():
                    timed_out = True
                    self._send({"op": "signal", "id": run_id, "signal": signal.SIGTERM})
                    await asyncio.wait({ended}, timeout=TERM_GRACE_S)
                await self._kill(run_id, ended)
            except asyncio.CancelledError:
                await self._kill(run_id, ended)
                raise
            seconds = time.monotonic() - started_at
            await asyncio.wait([capture.ended for capture in captures], timeout=DRAIN_S)
        finally:
            for capture in captures:
                capture.close()
            del self._runs[run_id]
            self._pids.pop(run_id, None)
        stdout, stderr, *report = captures
        end, exit_code, signal_number, words = self._read_end(
            ended.result(), job, timed_out, run_id in self._stopped
        )
        result = AgentResult(
            end=end,
            exit_code=exit_code,
            signal=signal_number,
            stdout=stdout.text,
            stderr=stderr.text,
            seconds=seconds,
            warm=job.fork and self.preloaded,
            truncated=stdout.truncated or stderr.truncated,
            cpu_seconds=ended.result().get("cpu_seconds", 0.0),
            fault=words if end is AgentEnd.LAUNCH_FAILED else "",
            reason=words if end is AgentEnd.OVER_LIMIT else "",
        )
        return result, report[0].data if report else b""

    def _read_end(
        self, ended: dict[str, Any], job: Job, timed_out: bool, stopped: bool
    ) -> tuple[AgentEnd, int | None, int | None, str]:
        """How a run ended: (end, exit code, signal, what to say of it)."""
        if ended["event"] != "ended":
            if self._closing:
                return AgentEnd.CANCELLED, None, None, ""
            return AgentEnd.LAUNCH_FAILED, None, None, ended["error"]
        code = os.waitstatus_to_exitcode(ended["status"])
        exit_code, number = (code, None) if code >= 0 else (None, -code)
        if ended["over"] is not None:
            return AgentEnd.OVER_LIMIT, exit_code, number, job.over(*ended["over"])
        if timed_out:
            return AgentEnd.TIMED_OUT, exit_code, number, ""
        if number is None:
            return AgentEnd.EXITED, exit_code, None, ""
        return (AgentEnd.CANCELLED if stopped else AgentEnd.KILLED), None, number, ""

    async def _kill(self, run_id: int, ended: asyncio.Future[dict[str, Any]]) -> None:
        """Kill a run that has not ended, and wait until that is known to be done."""
        if ended.done():
            return
        self._send({"op": "signal", "id": run_id, "signal": signal.SIGKILL})
        await asyncio.wait({ended}, timeout=KILL_WAIT_S)
        if not ended.done():
            self._lost("it does not answer")

    async def close(self, kill: bool = True) -> None:
        """End the zygote. Harmless when repeated.

        Args:
            kill: Stop the runs that it holds, which end as CANCELLED; otherwise wait for them. Each
                has a time limit of its own.
        """
        while not kill and (waiting := [run for run in self._runs.values() if not run.done()]):
            await asyncio.wait(waiting)
        self._closing = True
        for run_id, run in list(self._runs.items()):
            if not run.done():
                self._stopped.add(run_id)
                self._send({"op": "signal", "id": run_id, "signal": signal.SIGKILL})
        if self._runs:
            await asyncio.wait(list(self._runs.values()), timeout=KILL_WAIT_S)
        if self._process is None:
            return
        self._lost("closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Only now: the tasks let go of the descriptor's number when they end.
        self._control.close()
        # It is killed by now; this only collects it.
        await asyncio.to_thread(self._process.wait, KILL_WAIT_S)
        for capture in self._output:
            capture.close()

    def _lost(self, reason: str) -> None:
        """The zygote is gone or of no use any more: end it and everything that it held."""
        if not self.alive:
            return
        self.alive = False
        assert self._process is not None
        for pid in self._pids.values():
            # Their leaders die with the zygote, but not what those have started.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self._process.kill()
        for task in self._tasks:
            task.cancel()
        while not self._outbox.empty():
            for fd in self._outbox.get_nowait()[1]:
                os.close(fd)
        message = {"event": "lost", "error": f"the process that starts agents was lost: {reason}"}
        for future in (self._ready, *self._runs.values()):
            if not future.done():
                future.set_result(message)

    def _send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Queue a message; the descriptors are closed here once they are with the zygote."""
        if not self.alive:
            for fd in fds:
                os.close(fd)
            future = self._runs.get(message.get("id", -1))
            if future is not None and not future.done():
                future.set_result({"event": "lost", "error": "the process that starts agents died"})
            return
        self._outbox.put_nowait((message, fds))

    async def _write(self) -> None:
        while True:
            message, fds = await self._outbox.get()
            try:
                payload = json.dumps(message).encode()
                header = struct.pack("!I", len(payload))
                while True:
                    try:
                        socket.send_fds(self._control, [header], fds)
                        break
                    except BlockingIOError:
                        await asyncio.sleep(0.002)
                await self._loop.sock_sendall(self._control, payload)
            except OSError as error:
                self._lost(f"writing to it failed: {error}")
                return
            finally:
                for fd in fds:
                    os.close(fd)

    async def _read(self) -> None:
        try:
            while True:
                (size,) = struct.unpack("!I", await self._read_exactly(4))
                self._dispatch(json.loads(await self._read_exactly(size)))
        except (EOFError, OSError) as error:
            self._lost(str(error))

    async def _read_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = await self._loop.sock_recv(self._control, size - len(data))
            if not chunk:
                raise EOFError("it ended")
            data += chunk
        return bytes(data)

    def _dispatch(self, message: dict[str, Any]) -> None:
        if message["event"] == "ready":
            self._ready.set_result(message)
            return
        run_id = message["id"]
        if message["event"] == "started":
            if run_id in self._runs:
                self._pids[run_id] = message["pid"]
            return
        self._pids.pop(run_id, None)
        future = self._runs.get(run_id)
        if future is not None and not future.done():
            future.set_result(message)
