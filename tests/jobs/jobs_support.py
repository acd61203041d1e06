"""A Ray cluster of its own, with a job server, for tests that submit to it."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass
class RayHead:
    """Where a cluster is, and what opens it."""

    url: str
    token: str

    @property
    def at(self) -> str:
        """The setting that names it."""
        return f"cluster.address={self.url}"


@contextlib.contextmanager
def ray_head(home: Path) -> Iterator[RayHead]:
    """Starts `ray start --head` with a job server on loopback; ends it with all it started.

    `home` is the home folder of what runs there.
    """
    # Sockets lie below it, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    gcs, dashboard, client, agent, agent_grpc, metrics, runtime_env = _free_ports(7)
    head = RayHead(f"http://127.0.0.1:{dashboard}", secrets.token_hex(16))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "LIGHTNING_RAY_CACHE": str(_model_cache()),
        # As where Ray is started from the environment that has our command.
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": head.token,
    }
    command = [
        str(BIN / "ray"),
        *("start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}"),
        *(f"--port={gcs}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *(f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime_env}"),
        *("--disable-usage-stats", f"--object-store-memory={256 * 2**20}"),
        "--labels=lightning-ray/role=everything",
    ]
    log = Path(folder) / "head.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=env, cwd=home, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_open(dashboard, process, log)
        yield head
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([*family, psutil.Process(process.pid)], timeout=10)
        for left in [*family, psutil.Process(process.pid)] if process.poll() is None else family:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _model_cache() -> Path:
    from lightning_ray.policies.models import cache_root

    return cache_root()


def _wait_until_open(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"no job server within 120 s:\n{log.read_text()[-3000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
