"""lightning-ray submit: run a job on a cluster.

    lightning-ray submit train experiment=calculator cluster=ray cluster.address=http://HOST:8265
    lightning-ray submit ls | status JOB | logs JOB [-f] | stop JOB    [cluster.address=...]
    lightning-ray submit train experiment=calculator cluster=kuberay   # prints a RayJob

Any command of ours can be submitted. What is typed is checked here, before anything is sent.
"""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lightning_ray.cluster import ClusterConfig
from lightning_ray.cluster.config import KUBERAY, check_submission
from lightning_ray.cluster.submission import at_home, make_submission
from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import CONFIGS, compose_config
from lightning_ray.tracking.redaction import masked

# Without a module of their own.
_BUILT_IN = ("version",)
_NOT_JOBS = ("compose", "submit")
# Commands that are configured as another one is.
_CONFIG_OF = {"evaluate": "train", "serve": "train"}
# Of `cluster`, what the driver over there reads too.
_FOR_THE_JOB = ("cluster.log_to_driver=", "cluster.stop_timeout_s=")


@dataclass
class SubmitConfig:
    """How a job is submitted."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to, and with what."""


def main(arguments: Sequence[str]) -> None:
    """Submits a job, or looks after one. Raises UserError for what the user can mend."""
    if not arguments:
        raise UserError(
            "what is to be submitted? `lightning-ray submit train ...`, or ls, status, logs, stop"
        )
    first, *rest = arguments
    if first in _VERBS:
        _VERBS[first](rest)
    else:
        _submit(first, rest)


def _submit(command: str, arguments: Sequence[str]) -> None:
    ours, typed = _divide(arguments)
    config = _cluster(ours)
    words = job_words(command, typed, config, ours)
    _check(command, words[1:], typed, config)
    if config.address == KUBERAY:
        from lightning_ray.cluster.kuberay import render_ray_job

        _leave(render_ray_job(config, words), config.manifest)
        return
    # Imported late: Ray's client takes a second, and a mistake should not.
    from lightning_ray.cluster.job_server import JobServer

    submission = make_submission(config, words)
    server = JobServer(config)
    server.submit(submission, lambda line: print(line, file=sys.stderr))
    at = "" if config.address == "auto" else f" cluster.address={server.url}"
    print(f"submitted {submission.job} to {server.url}")
    print(f"  runs there: {submission.entrypoint.removeprefix('exec ')}")
    for verb in ("logs -f", "status", "stop"):
        name, *option = verb.split()
        print(f"  lightning-ray submit {' '.join([name, submission.job, *option])}{at}")


def job_words(
    command: str, typed: Sequence[str], config: ClusterConfig, ours: Sequence[str] = ()
) -> list[str]:
    """The command as the cluster runs it: the cluster's settings, what was typed, and where."""
    groups = _groups(command)
    if groups is None:
        return [command, *typed]
    # What follows `--` is somebody else's command line.
    end = typed.index("--") if "--" in typed else len(typed)
    own = [_over_there(word, config.working_dir) for word in typed[:end]]
    # Words without a value, such as the name of a run, come first and stay first.
    place = next((at for at, word in enumerate(own) if "=" in word), end)
    settings = [
        setting
        for setting in config.settings
        if "." not in (key := setting.lstrip("+").partition("=")[0]) or key.split(".")[0] in groups
    ]
    where = [word for word in ours if word.startswith(_FOR_THE_JOB)]
    if "cluster" in groups:
        where = ["cluster=ray", "cluster.address=auto", *where]
    return [command, *own[:place], *settings, *own[place:], *where, *typed[end:]]


def _over_there(word: str, working_dir: str) -> str:
    """A word in which a folder of configurations of the working directory is that of its copy."""
    if not word.startswith("hydra.searchpath="):
        return word
    return word.replace(f"file://{Path(working_dir).absolute()}/", "file://")


def _groups(command: str) -> set[str] | None:
    """The Hydra groups of a command's configuration; None where it takes no settings."""
    path = CONFIGS / f"{_module(_CONFIG_OF.get(command, command))}.yaml"
    if not path.is_file():
        return None
    defaults = yaml.safe_load(path.read_text())["defaults"]
    return {name for entry in defaults if isinstance(entry, dict) for name in entry}


def _module(command: str) -> str:
    return command.replace("-", "_")


def _divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of `cluster`, which are for submitting, and the words that the job gets."""
    ours: list[str] = []
    typed: list[str] = []
    for place, word in enumerate(arguments):
        if word == "--":
            # What follows is somebody else's command line.
            return ours, [*typed, *arguments[place:]]
        key = word.lstrip("+~").partition("=")[0]
        (ours if key == "cluster" or key.startswith("cluster.") else typed).append(word)
        if key == "hydra.searchpath":
            ours.append(word)
    return ours, typed


def _cluster(overrides: Sequence[str]) -> ClusterConfig:
    config: SubmitConfig = compose_config("submit", SubmitConfig, overrides)
    check_submission(config.cluster)
    return config.cluster


def _check(command: str, words: Sequence[str], typed: Sequence[str], config: ClusterConfig) -> None:
    """Raises UserError for what can be told of a job before it is sent."""
    known = command in _BUILT_IN or (
        command not in _NOT_JOBS
        and command.replace("-", "").isalnum()
        and importlib.util.find_spec(f"lightning_ray.jobs.{_module(command)}") is not None
    )
    if not known:
        raise UserError(f"no command {command!r} to submit; try `lightning-ray help`")
    _check_secrets(typed, config.env_vars)
    local = "://" not in config.working_dir
    if local and not Path(config.working_dir).is_dir():
        raise UserError(f"cluster.working_dir={config.working_dir}: no such folder")
    for word in typed:
        key, _, value = word.partition("=")
        if key == "output_dir" and not value.startswith(("/", "~/", "$", "\\$")):
            raise UserError(
                f"{word}: on a cluster that lies in Ray's copy of the working directory, which "
                "goes when the job has ended; give a path that begins with / or ~/"
            )
    if command in _BUILT_IN:
        return
    check: Callable[[Sequence[str]], None] | None
    check = getattr(import_module(f"lightning_ray.jobs.{_module(command)}"), "check", None)
    if check is not None:
        with contextlib.chdir(config.working_dir if local else "."):
            check([at_home(word, str(Path.home())) for word in words])


def _check_secrets(typed: Sequence[str], variables: Sequence[str]) -> None:
    """Raises UserError when a secret would stand in the job's command, for all to read.

    The name of one of `variables` is no secret, whatever it is the value of; neither is `${...}`.
    """
    for word in typed:
        key, equals, text = word.partition("=")
        if not equals:
            continue
        try:
            value = OverridesParser.create().parse_override(word).value()
        except HydraException:
            # Not a setting, or a mistake that composing the configuration says better.
            value = text
        nested: Any = _without(variables, value)
        for name in reversed(key.lstrip("+~").split(".")):
            nested = {name: nested}
        if masked(nested) != nested:
            raise UserError(
                f"{key}: its value would stand in the job's command for all to read; export it "
                "under some NAME, add that to cluster.env_vars, and write '${oc.env:NAME}' instead"
            )


def _without(names: Sequence[str], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(names, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(names, item) for item in value]
    return None if value in names or str(value).startswith("${") else value


def _leave(manifest: str, path: str | None) -> None:
    if path is None:
        print(manifest, end="")
        return
    try:
        Path(path).write_text(manifest)
    except OSError as error:
        raise UserError(f"cluster.manifest={path}: {error.strerror}") from error
    print(f"wrote {path}; `kubectl apply -f {path}` starts the job")


def _server(arguments: Sequence[str], *, job: bool, follow: bool = False) -> Any:
    """The job server, the job's id, and whether -f was given, from a verb's arguments."""
    from lightning_ray.cluster.job_server import JobServer

    ours, words = _divide(arguments)
    options = [word for word in words if word in ("-f", "--follow")] if follow else []
    words = [word for word in words if word not in options]
    if len(words) != int(job):
        wanted = "one JOB, as `lightning-ray submit ls` names it" if job else "no further word"
        raise UserError(f"it takes {wanted}, and got: {' '.join(words) or 'nothing'}")
    config = _cluster(ours)
    return JobServer(config), config, (words[0] if job else ""), bool(options)


def _ls(arguments: Sequence[str]) -> None:
    server, _, _, _ = _server(arguments, job=False)
    jobs = server.jobs()
    for details in jobs:
        print(
            f"{details.submission_id:<28} {details.status!s:<10} {_lasted(details):>8}  "
            f"{details.entrypoint.removeprefix('exec ')[:100]}"
        )
    if not jobs:
        print(f"no jobs at {server.url}")


def _status(arguments: Sequence[str]) -> None:
    server, _, job, _ = _server(arguments, job=True)
    details = server.details(job)
    print(f"{job}: {details.status} ({_lasted(details)})")
    print(f"  {details.entrypoint.removeprefix('exec ')}")
    if reason := _reason(details):
        print(f"  {reason}")


def _logs(arguments: Sequence[str]) -> None:
    server, _, job, follow = _server(arguments, job=True, follow=True)
    if not follow:
        print(server.logs(job), end="")
        return
    try:
        details = server.follow(job, _write)
    except KeyboardInterrupt:
        print(f"\n{job} goes on; `lightning-ray submit stop {job}` stops it", file=sys.stderr)
        raise
    print(f"{job}: {details.status} ({_lasted(details)})", file=sys.stderr)
    if details.status != "SUCCEEDED":
        raise SystemExit(1)


def _stop(arguments: Sequence[str]) -> None:
    server, config, job, _ = _server(arguments, job=True)
    before = server.details(job).status
    # Ray waits as long for the job's clean end, kills what is left, and then says so.
    details = server.stop(job, config.job_stop_timeout_s + 30)
    already = "had ended already: " if before.is_terminal() else ""
    print(f"{job}: {already}{details.status} ({_lasted(details)})")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _lasted(details: Any) -> str:
    if details.start_time is None:
        return "not started"
    end = details.end_time / 1000 if details.end_time else time.time()
    return f"{max(0.0, end - details.start_time / 1000):.0f} s"


def _reason(details: Any) -> str:
    """Why a job failed, in a line; empty for one that did not."""
    if details.status != "FAILED":
        return ""
    if details.driver_exit_code == 127:
        return (
            "exit status 127: our command is not on PATH there; start Ray from its environment, "
            "or set cluster.program"
        )
    if details.driver_exit_code is not None:
        return f"exit status {details.driver_exit_code}; `lightning-ray submit logs` has the rest"
    lines = [line.strip() for line in (details.message or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


_VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "ls": _ls,
    "status": _status,
    "logs": _logs,
    "stop": _stop,
}
