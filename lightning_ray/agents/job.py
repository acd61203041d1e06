"""One program to run, as a zygote is told of it."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ray.errors import InfrastructureError

_MB = 1_000_000


@dataclass(frozen=True)
class Job:
    """One program to run."""

    argv: Sequence[str]
    env: Mapping[str, str]
    """Its complete environment."""
    path: str = ""
    """The program to execute; not used with `fork`."""
    fork: bool = False
    """Run the script `argv[script]` in a fork of the zygote instead of executing `path`."""
    script: int = 0
    stdin: bytes | None = None
    """What it reads on standard input; None is nothing."""
    max_memory_mb: int | None = None
    """Most memory of its process group, 10^6 bytes; None is no limit."""
    max_processes: int | None = None
    """Most processes in its group at a time; None is no limit."""

    def message(self) -> dict[str, Any]:
        """What a zygote has to know of it."""
        return {
            "fork": self.fork,
            "path": self.path,
            "argv": list(self.argv),
            "script": self.script,
            "env": dict(self.env),
            "stdin": self.stdin is not None,
            "max_memory": None if self.max_memory_mb is None else self.max_memory_mb * _MB,
            "max_processes": self.max_processes,
        }

    def stdin_fd(self) -> int:
        """A new descriptor from which its standard input can be read, to its end.

        A file, not a pipe: nobody has to go on writing for as long as the agent does not read.

        Raises:
            InfrastructureError: there is no room for it.
        """
        try:
            with tempfile.TemporaryFile() as file:
                file.write(self.stdin or b"")
                file.seek(0)
                return os.dup(file.fileno())
        except OSError as error:
            raise InfrastructureError(f"the standard input of an agent: {error}") from error

    def over(self, limit: str, held: int) -> str:
        """What is said of it when it was ended because it held too much.

        Args:
            limit: "memory" or "processes".
        """
        if limit == "memory":
            return (
                f"over agent.max_memory_mb={self.max_memory_mb}: its processes held "
                f"{held // _MB} MB together"
            )
        return f"over agent.max_processes={self.max_processes}: it had {held} processes at a time"
