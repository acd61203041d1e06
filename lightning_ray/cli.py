"""The `lightning-ray` command: finds the job that was asked for and prints errors as one line."""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import FrameType

from lightning_ray import __version__
from lightning_ray.cluster.environment import quiet_environment
from lightning_ray.errors import InfrastructureError, UserError


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    job: str
    """Module below `lightning_ray.jobs`; its `main(arguments)` is the command."""
    usage: tuple[tuple[str, str], ...]
    """What can be typed after the command's name, and what it does."""


COMMANDS = {
    "train": Command(
        "train",
        (
            ("experiment=NAME [KEY=VALUE ...]", "train an agent; Hydra overrides as usual"),
            ("resume=RUN [KEY=VALUE ...]", "go on with a run from its last checkpoint"),
            ("--multirun KEY=A,B [KEY=VALUE ...]", "a sweep: a run for each combination"),
            ("--multirun resume=SWEEP", "go on with a sweep's unfinished runs"),
        ),
    ),
    "compare": Command(
        "compare",
        (
            ("RUN RUN [RUN ...]", "what differs between runs, in figures and in a picture"),
            ("SWEEP", "the same of a sweep's runs; also --json FILE --picture FILE --no-log"),
        ),
    ),
    "serve": Command(
        "serve",
        (
            (
                "[experiment=NAME] [KEY=VALUE ...]",
                "released versions behind the gateway, for live use",
            ),
        ),
    ),
    "release": Command(
        "release",
        (
            ("status [POLICY]", "which versions serve, and why"),
            ("canary POLICY VERSION [share=0.1]", "try a version on a share of conversations"),
            ("promote POLICY [VERSION]", "make the candidate, or a version, the champion"),
            ("rollback POLICY", "withdraw the candidate, or go back to the last champion"),
        ),
    ),
    "submit": Command(
        "submit",
        (
            ("COMMAND [ARGUMENT ...] [cluster.KEY=VALUE ...]", "run a command on a Ray cluster"),
            ("ls | status JOB | logs JOB [-f] | stop JOB", "look after submitted jobs"),
        ),
    ),
    "evaluate": Command(
        "evaluate",
        (
            ("run=RUN [version=N] [against=M] [KEY=VALUE ...]", "a version on held-out tasks"),
            ("experiment=NAME [against=FOLDER] [KEY=VALUE ...]", "policy.model on held-out tasks"),
            ('spans=RUN [where="SQL"] [against=RUN] [...]', "the measures over recorded spans"),
        ),
    ),
    "spans": Command(
        "spans",
        (
            (
                "check RUN [heldout=FILE] [hygiene.CHECK=POLICY ...] [--strict] [--json FILE]",
                "what is wrong with a run's spans; status 3 where it must not be",
            ),
            ('sql RUN "SELECT ... FROM spans" [--csv FILE] [--parquet FILE]', "ask its spans"),
            ('export RUN [where="SQL"] --parquet FILE | --csv FILE', "its spans as a file or URI"),
            ('forward RUN rollout=ID,... | where="SQL"', "chosen attempts as MLflow traces"),
            ("remove RUN [keep_days=N] [keep_bytes=N] [--yes]", "remove its sealed spans"),
        ),
    ),
    "rollouts": Command(
        "rollouts",
        (
            (
                "ls RUN [status=STATUS] [task=ID] [group=ID] [attempts=N] [limit=N]",
                "the rollouts of a run",
            ),
            ("show RUN ROLLOUT", "its attempts, rewards and spans"),
            ("retry | cancel RUN ROLLOUT ...", "of a run that is going on; also cancel RUN all"),
            ("workers RUN", "who is idle, busy or lost"),
        ),
    ),
    "finetune": Command(
        "finetune",
        (
            ("from=RUN min_reward=N [KEY=VALUE ...]", "tune on a run's spans, chosen by reward"),
            ("from=RUN where=SQL | sql=SQL [KEY=VALUE ...]", "... or by SQL over its attempts"),
            ("resume=RUN [KEY=VALUE ...]", "go on from the last checkpoint"),
        ),
    ),
    "doctor": Command(
        "doctor",
        (
            ("[KEY=VALUE ...] -- COMMAND ...", "what would a trainer see of this agent?"),
            ("tasks=FILE count=3 -- COMMAND ...", "the same on tasks, whose fields {field} takes"),
            ("... --json FILE -- COMMAND ...", "also write the report to a file"),
        ),
    ),
    "optimize-prompt": Command(
        "optimize_prompt",
        (
            ("experiment=NAME [KEY=VALUE ...]", "a better system prompt, by demonstrations"),
            (
                "experiment=NAME prompt=reflection prompt.reflection.base_url=URL ...",
                "... or written by a language model",
            ),
        ),
    ),
}


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit status: 0, 1 fault, 2 a mistake to mend, 130 interrupted.

    A command may end with a status of its own by raising SystemExit: a gate that is not met, say.
    """
    # Before anything is imported that would read them.
    quiet_environment()
    signal.signal(signal.SIGTERM, _interrupt)
    name, *rest = arguments or ["help"]
    if name in ("help", "-h", "--help"):
        print(usage(), end="")
        return 0
    if name == "version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}; try `lightning-ray help`", file=sys.stderr)
        return 2
    if _asks_for_help(rest):
        print(usage(name), end="")
        return 0
    try:
        job: Callable[[Sequence[str]], None] = import_module(
            f"lightning_ray.jobs.{COMMANDS[name].job}"
        ).main
        job(rest)
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


def usage(name: str | None = None) -> str:
    """What can be typed: every command, or one."""
    lines = [
        (f"{command} {words}".rstrip(), meaning)
        for command in ([name] if name else COMMANDS)
        for words, meaning in COMMANDS[command].usage
    ]
    if name is None:
        lines.append(("version", "print the version"))
    width = max(len(typed) for typed, _ in lines)
    return "usage: lightning-ray COMMAND ...\n\ncommands:\n" + "".join(
        f"  {typed.ljust(width)}   {meaning}\n" for typed, meaning in lines
    )


def _asks_for_help(rest: Sequence[str]) -> bool:
    # What follows `--` is somebody else's command line.
    own = rest[: rest.index("--")] if "--" in rest else rest
    return any(word in ("-h", "--help") for word in own)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # A cluster stops its jobs with SIGTERM: the same clean end as Ctrl-C.
    raise KeyboardInterrupt


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
