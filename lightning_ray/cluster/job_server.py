"""Ray's job server: sending a job, looking at it, following its log, stopping it.

Invariant: every wait has a limit, and what goes wrong is one line that says what to change. A job
does not depend on who looks at it: leaving the log, or losing the server, leaves the job alone.
"""

import asyncio
import io
import logging
import os
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from lightning_ray.cluster.config import KUBERAY, ClusterConfig
from lightning_ray.cluster.connection import knock
from lightning_ray.cluster.submission import Submission
from lightning_ray.errors import InfrastructureError, UserError

DEFAULT_URL = "http://127.0.0.1:8265"
REQUEST_TIMEOUT_S = 60.0
AGENT_WAIT_S = 60.0
"""How long a cluster that has just started may take until it can start jobs."""
LOOK_EVERY_S = 0.5
SILENCE_S = 15.0
"""A log that says nothing for so long is asked after."""

# They would be obeyed in place of the address that is given.
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class JobServer:
    """A connection to the job server of a running cluster."""

    def __init__(self, config: ClusterConfig):
        """Raises UserError when no job server answers at `config.address`, or not to us."""
        self.url = server_url(config.address)
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            knock(_host_and_port(self.url))
            with _without_addresses():
                self._client = _Client(self.url, headers=_token_header())
        except AuthenticationError as error:
            self._refuse(error)
        except (OSError, ValueError, RuntimeError) as error:
            # Requests' own errors are OSErrors.
            raise UserError(
                f"cluster.address={self.url}: no Ray job server answers there ({_telling(error)}); "
                "name the address of a cluster's dashboard, or start one with "
                "`ray start --head`"
            ) from error
        self._client.max_upload_mib = config.max_upload_mib

    def submit(self, submission: Submission, say: Callable[[str], None]) -> None:
        """Sends the working directory and the job, once the cluster has an agent that starts jobs.

        Raises UserError when it is not taken, InfrastructureError when there is no agent for
        `AGENT_WAIT_S`; that it waits for one it says once, through `say`.
        """
        deadline = time.monotonic() + AGENT_WAIT_S
        waits = False
        while True:
            try:
                return self._submit(submission)
            except _NoAgentError as error:
                # Ray opens the job server first; on a busy machine that can be a while before.
                if time.monotonic() > deadline:
                    raise InfrastructureError(
                        f"the job server at {self.url} has had no agent for jobs for "
                        f"{AGENT_WAIT_S:.0f} s; see whether its port was taken there "
                        "(`ray start --dashboard-agent-listen-port=PORT`)"
                    ) from error
            if not waits:
                say(
                    f"{self.url} has no agent for jobs yet; waiting for one up to "
                    f"{AGENT_WAIT_S:.0f} s"
                )
                waits = True
            time.sleep(LOOK_EVERY_S)

    def _submit(self, submission: Submission) -> None:
        try:
            with self._errors():
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission.job,
                    runtime_env=submission.runtime_env,
                )
        except InfrastructureError as error:
            if "already exists" in str(error):
                raise UserError(
                    f"cluster.job={submission.job}: {self.url} has a job of that id; choose another"
                ) from error
            if "No available agent" in str(error):
                raise _NoAgentError(str(error)) from error
            raise

    def details(self, job: str) -> JobDetails:
        """What the server knows of a job. Raises UserError when there is none of that id."""
        with self._errors(job):
            return self._client.get_job_info(job)

    def jobs(self) -> list[JobDetails]:
        """Every submitted job that the cluster remembers, oldest first."""
        with self._errors():
            listed = self._client.list_jobs()
        submitted = [job for job in listed if job.submission_id]
        return sorted(submitted, key=lambda job: job.start_time or 0)

    def logs(self, job: str) -> str:
        """What a job has printed. Raises UserError when there is none of that id."""
        with self._errors(job):
            return self._client.get_job_logs(job)

    def follow(self, job: str, write: Callable[[str], None]) -> JobDetails:
        """Passes on what a job prints until it has ended; returns what became of it.

        Raises UserError when there is none of that id, InfrastructureError when the server is lost.
        """
        self.details(job)
        with self._errors(job):
            asyncio.run(self._tail(job, write))
        return self.wait(job, REQUEST_TIMEOUT_S)

    def stop(self, job: str, timeout_s: float) -> JobDetails:
        """Asks a job to end and waits until it has; one that has ended already stays as it is.

        Raises UserError when there is none of that id, InfrastructureError when it has not ended
        after `timeout_s`.
        """
        if self.details(job).status.is_terminal():
            return self.details(job)
        with self._errors(job):
            self._client.stop_job(job)
        return self.wait(job, timeout_s)

    def wait(self, job: str, timeout_s: float) -> JobDetails:
        """Waits until a job has ended. Raises InfrastructureError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not (details := self.details(job)).status.is_terminal():
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"waited {timeout_s:.0f} s for job {job} to end; it is {details.status}"
                )
            time.sleep(LOOK_EVERY_S)
        return details

    async def _tail(self, job: str, write: Callable[[str], None]) -> None:
        tail: AsyncIterator[str] = self._client.tail_job_logs(job)
        while True:
            part = asyncio.ensure_future(anext(tail, None))
            while not (await asyncio.wait([part], timeout=SILENCE_S))[0]:
                # A server that is gone says so here; one that is there may have nothing to say.
                details = await asyncio.to_thread(self.details, job)
                if details.status.is_terminal() and not part.done():
                    part.cancel()
                    return
            if (text := part.result()) is None:
                return
            write(text)

    @contextmanager
    def _errors(self, job: str = "") -> Iterator[None]:
        """Turns what the client raises into one line of ours."""
        try:
            yield
        except AuthenticationError as error:
            self._refuse(error)
        except (OSError, RuntimeError, ValueError, aiohttp.ClientError) as error:
            if job and "404" in str(error):
                raise UserError(
                    f"no job {job} at {self.url}; `lightning-ray submit ls "
                    f"cluster.address={self.url}` lists those it has"
                ) from error
            raise InfrastructureError(f"the job server at {self.url}: {_telling(error)}") from error

    def _refuse(self, error: AuthenticationError) -> NoReturn:
        found = "the token given here is another's" if _token() else "there is no token here"
        raise UserError(
            f"cluster.address={self.url}: the cluster asks for a token and {found}; put the "
            "cluster's own into RAY_AUTH_TOKEN, or into the file that RAY_AUTH_TOKEN_PATH names "
            "(~/.ray/auth_token by default)"
        ) from error


class _NoAgentError(InfrastructureError):
    """The job server has nothing that could start a job."""


class _Client(JobSubmissionClient):
    """Ray's client with a limit to every request and to what is uploaded."""

    max_upload_mib = 0

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        package = kwargs.get("data")
        if package is not None and len(package) > self.max_upload_mib * 2**20:
            raise UserError(
                f"the working directory is {len(package) / 2**20:.0f} MiB packed, above "
                f"cluster.max_upload_mib={self.max_upload_mib}; add to cluster.excludes what the "
                f"job does not need. The largest parts: {_largest(package)}"
            )
        kwargs.setdefault("timeout", REQUEST_TIMEOUT_S)
        return super()._do_request(method, endpoint, **kwargs)


def server_url(address: str) -> str:
    """The URL of the job server that `cluster.address` names. Raises UserError for none."""
    if address == "auto":
        return os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_URL).rstrip("/")
    if address in ("local", KUBERAY) or address.startswith("ray://"):
        raise UserError(
            f"cluster.address={address}: that is no job server; name one as "
            "cluster=ray cluster.address=http://HOST:8265"
        )
    return (address if "://" in address else f"http://{address}").rstrip("/")


def _host_and_port(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is no http:// address")
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


@contextmanager
def _without_addresses() -> Iterator[None]:
    """What is typed stands above Ray's environment variables, which would win otherwise."""
    kept = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _token_header() -> dict[str, str]:
    """The cluster's token, as the job server asks for it.

    Ray's client sends one only with RAY_AUTH_MODE=token, while `ray start` and `ray.init` ask for
    one wherever one exists.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return {}
    token = _token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _token() -> str:
    """The token where Ray looks for it: two variables, then its file; "" for none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return path.read_text().strip() if path.is_file() else ""


def _largest(package: bytes) -> str:
    """The largest entries of a package's top folder."""
    sizes: Counter[str] = Counter()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        for entry in archive.infolist():
            sizes[entry.filename.split("/")[0]] += entry.compress_size
    return ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in sizes.most_common(3))


def _telling(error: BaseException) -> str:
    """The line that names the cause; of a traceback that the server sent, the last."""
    lines = [line.strip() for line in str(error).splitlines() if len(line.strip()) > 1]
    if not lines:
        return type(error).__name__
    return lines[-1 if "Traceback" in lines[0] else 0][:300]
