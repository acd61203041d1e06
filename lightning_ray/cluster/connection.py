"""Connecting to Ray, and leaving nothing behind.

Invariant: after `Connection.close`, no process that a local cluster of ours started is alive,
whatever state the job was in; and where the driver died without closing, its guardian sees to it.
"""

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import ray

from lightning_ray.cluster.config import ClusterConfig
from lightning_ray.cluster.guardian import Guardian
from lightning_ray.errors import UserError

log = logging.getLogger(__name__)

KNOCK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Needs:
    """What the parts of a job ask Ray for, together. Ray would wait for it without an end."""

    cpus: float = 0.0
    gpus: float = 0.0


class Connection:
    """A job's connection to Ray; a context manager."""

    def __init__(self, config: ClusterConfig, needs: Needs = Needs()):
        self._config = config
        self._needs = needs
        self._local = config.address == "local"
        self._guardian: Guardian | None = None

    def __enter__(self) -> "Connection":
        """Starts or joins the cluster. Raises UserError when there is none at the address."""
        config = self._config
        common = {
            "log_to_driver": config.log_to_driver,
            "logging_level": logging.ERROR,
            "namespace": "lightning-ray",
        }
        if self._local:
            self._guardian = Guardian()
            # More than there are share what there is: every part of a job is needed at once.
            plenty = max(2, os.cpu_count() or 2, math.ceil(self._needs.cpus))
            with _own_sigterm():
                ray.init(
                    address="local",
                    num_cpus=config.num_cpus or plenty,
                    object_store_memory=config.object_store_mib * 1024 * 1024,
                    include_dashboard=False,
                    **common,
                )
            children = psutil.Process().children()
            self._guardian.watch([c for c in children if c.pid != self._guardian.pid])
            self._require_room()
            return self
        try:
            knock(config.address)
            with _own_sigterm():
                ray.init(address=config.address, **common)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cluster.address={config.address}: no Ray cluster answers there ({reason}); "
                "start one, or use cluster.address=local"
            ) from error
        self._require_room()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the cluster; a local one is stopped, with every process it started."""
        # Listed before the parents go: an orphan has no parent to be found by.
        children = psutil.Process().children(recursive=True) if self._guardian else []
        ray.shutdown()
        if self._guardian is not None:
            others = [child for child in children if child.pid != self._guardian.pid]
            end_processes(others, self._config.stop_timeout_s)
            self._guardian.dismiss()
            self._guardian = None

    def _require_room(self) -> None:
        """Raises UserError when the cluster is too small for the job as a whole."""
        total = ray.cluster_resources()
        for name, needed in (("CPU", self._needs.cpus), ("GPU", self._needs.gpus)):
            if needed > total.get(name, 0.0):
                raise UserError(
                    f"the job's parts ask for {needed:g} {name}s and the cluster has "
                    f"{total.get(name, 0.0):g}; lower inference.num_{name.lower()}s and "
                    f"learner.num_{name.lower()}s, or add nodes"
                )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM did before `ray.init` it does afterwards.

    Ray puts two handlers in its place: one ends the interpreter, and one, in C++, arms an alarm
    that aborts the process three seconds later, in the middle of what it was putting in order.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    # Python allows it in the main thread alone; Ray's handlers come there alone, too.
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def knock(address: str) -> None:
    """Raises OSError when nothing listens at HOST:PORT; Ray itself tries for over a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_TIMEOUT_S).close()


def end_processes(processes: Iterable[psutil.Process], timeout_s: float) -> int:
    """Waits for processes to end, then kills the rest; returns how many had to be killed."""
    # `wait_procs` knows a process by its start time too, so a reused pid is nobody's victim.
    _, alive = psutil.wait_procs(list(processes), timeout=min(2.0, timeout_s))
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=timeout_s)
    return len(alive)
