"""What is handed to a cluster for a job: its id, the command it runs, and its environment.

Invariant: the command says everything that the job does, and can be run by hand on the head. The
values of `cluster.env_vars` are not in it: they travel in the runtime environment (Ray) or stay in
a Secret (Kubernetes).
"""

import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ray.cluster.config import ClusterConfig
from lightning_ray.errors import UserError

_HOME = re.compile(r"([\w.+-]+=)?~/(.*)", re.DOTALL)


@dataclass(frozen=True)
class Submission:
    """A job, ready to be sent or rendered."""

    job: str
    """Its id on the cluster."""
    entrypoint: str
    """Shell command of the driver."""
    runtime_env: dict[str, Any]
    """Ray's runtime environment; holds the values of `cluster.env_vars`."""


def make_submission(
    config: ClusterConfig, words: Sequence[str], environment: Mapping[str, str] = os.environ
) -> Submission:
    """The job that runs `lightning-ray WORDS` on the cluster.

    Raises UserError when a variable of `cluster.env_vars` is not set here.
    """
    missing = [name for name in config.env_vars if name not in environment]
    if missing:
        raise UserError(
            f"cluster.env_vars: {', '.join(missing)} is not set here; export it, or take it off "
            "the list"
        )
    values = {name: environment[name] for name in config.env_vars}
    return Submission(
        job=config.job or f"{words[0]}-{secrets.token_hex(4)}",
        entrypoint=shell_command([config.program, *words]),
        runtime_env={**runtime_env(config), "env_vars": {**stop_limit(config), **values}},
    )


def runtime_env(config: ClusterConfig) -> dict[str, Any]:
    """The working directory, as Ray's runtime environment has it."""
    env: dict[str, Any] = {"working_dir": config.working_dir}
    if "://" not in config.working_dir:
        env["excludes"] = list(config.excludes)
    return env


def stop_limit(config: ClusterConfig) -> dict[str, str]:
    """Has Ray wait for a job's clean end; it kills after 3 seconds where nothing is said."""
    # Ray's job supervisor reads it, and it has the job's environment.
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(round(config.job_stop_timeout_s))}


def shell_command(words: Sequence[str]) -> str:
    """The words as one shell command, in place of the shell, so that signals reach our process.

    `~/` at the beginning of a word, or of a setting's value, is the home folder over there.
    """
    return "exec " + " ".join(_quoted(word) for word in words)


def at_home(word: str, home: str) -> str:
    """A word whose `~/`, at its beginning or its value's, is the folder `home`."""
    found = _HOME.fullmatch(word)
    return f"{found.group(1) or ''}{home}/{found.group(2)}" if found else word


def _quoted(word: str) -> str:
    if not _HOME.fullmatch(word):
        return shlex.quote(word)
    key, _, path = at_home(word, "\0").partition("\0/")
    return f'{shlex.quote(key) if key else ""}"$HOME"/{shlex.quote(path) if path else ""}'
