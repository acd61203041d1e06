"""The `lightning-ray` command: finds the job that was asked for and prints errors as one line."""

import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from lightning_ray import __version__
from lightning_ray.cluster.environment import quiet_environment
from lightning_ray.errors import InfrastructureError, UserError

USAGE = """usage: lightning-ray COMMAND [KEY=VALUE ...]

commands:
  train experiment=NAME [KEY=VALUE ...]   train an agent; Hydra overrides as usual
  train resume=RUN [KEY=VALUE ...]        go on with a run from its last checkpoint
  version                                 print the version
"""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit status: 0, 1 fault, 2 a mistake to mend, 130 interrupted."""
    # Before anything is imported that would read them.
    quiet_environment()
    signal.signal(signal.SIGTERM, _interrupt)
    command, *rest = arguments or ["help"]
    if command in ("help", "-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "version":
        print(__version__)
        return 0
    jobs: dict[str, Callable[[], Callable[[Sequence[str]], None]]] = {"train": _train}
    if command not in jobs:
        print(f"error: no command {command!r}; try `lightning-ray help`", file=sys.stderr)
        return 2
    if any(word in ("-h", "--help") for word in rest):
        print(USAGE, end="")
        return 0
    try:
        jobs[command]()(rest)
        return 0
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except InfrastructureError as error:
        print(f"fault: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _train() -> Callable[[Sequence[str]], None]:
    from lightning_ray.jobs.train import main as job

    return job


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # A cluster stops its jobs with SIGTERM: the same clean end as Ctrl-C.
    raise KeyboardInterrupt


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
