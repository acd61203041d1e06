"""An agent that is already running and gets each task by HTTP.

It has no environment that we could set, so each request says where the attempt's model calls,
rewards and telemetry go: in headers, and in the body under `lightning_ray`.

Invariant: an attempt has a connection of its own, which is closed when the attempt is over, however
it ends. So a service notices that nobody waits any longer.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import aiohttp

from lightning_ray.agents.config import AgentConfig
from lightning_ray.agents.environment import REWARD_VARIABLE
from lightning_ray.agents.result import AgentEnd, AgentResult
from lightning_ray.agents.task import Task
from lightning_ray.errors import InfrastructureError, UserError

TOLD = {
    "base_url": "OPENAI_BASE_URL",
    "anthropic_base_url": "ANTHROPIC_BASE_URL",
    "api_key": "OPENAI_API_KEY",
    "reward_url": REWARD_VARIABLE,
    "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT",
}
"""What a request says of its attempt, and the variable that says it to a command."""
HEADER = "x-lightning-ray-"
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110
_METHODS = ("POST", "PUT", "PATCH")
_SHOWN_CHARACTERS = 500
_CLOSE_S = 5.0
# What is said of a process that we start, and has no hold on a service.
_A_PROCESS = (
    "python",
    "env",
    "env_names",
    "task_env",
    "task_by",
    "result_by",
    "graded_exit_codes",
    "max_memory_mb",
    "max_processes",
)


class ServiceLauncher:
    """A `Launcher` that starts nothing: it asks a service."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._session: aiohttp.ClientSession | None = None
        self._running: set[asyncio.Task[AgentResult]] = set()
        self._closed = False

    async def start(self) -> None:
        """See `Launcher.start`."""
        self._live_session()

    async def run(self, task: Task, env: Mapping[str, str], timeout_s: float) -> AgentResult:
        """See `Launcher.run`."""
        session = self._live_session()
        asking = asyncio.ensure_future(self._ask(session, task, env, timeout_s))
        self._running.add(asking)
        began = time.monotonic()
        try:
            return await asking
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if not self._closed or (own is not None and own.cancelling()):
                raise
            return _ended(AgentEnd.CANCELLED, began)
        finally:
            self._running.discard(asking)

    async def close(self) -> None:
        """See `Launcher.close`."""
        self._closed = True
        for asking in list(self._running):
            asking.cancel()
        if self._running:
            # They only have to close a connection; nobody waits for one that cannot.
            await asyncio.wait(list(self._running), timeout=_CLOSE_S)
        if self._session is not None:
            await self._session.close()

    async def _ask(
        self, session: aiohttp.ClientSession, task: Task, env: Mapping[str, str], timeout_s: float
    ) -> AgentResult:
        service, began = self._config.service, time.monotonic()
        told = {name: env[variable] for name, variable in TOLD.items() if variable in env}
        # In lower case, so that a header given twice is one.
        headers = {"content-type": "application/json"}
        headers |= {name.lower(): value for name, value in service.headers.items()}
        headers |= {HEADER + name.replace("_", "-"): value for name, value in told.items()}
        body = {**task.data, "id": task.id, "lightning_ray": told}
        try:
            async with asyncio.timeout(min(timeout_s, service.timeout_s or timeout_s)):
                async with session.request(
                    service.method,
                    service.url,
                    data=json.dumps(body).encode("ascii"),
                    headers=headers,
                    # The headers are for the service that is named, and for nobody that it names.
                    allow_redirects=False,
                ) as reply:
                    text, cut = await self._read(reply)
                    status = reply.status
        except TimeoutError:
            return _ended(AgentEnd.TIMED_OUT, began)
        except aiohttp.ClientConnectorError as error:
            fault = f"agent.service.url: {service.url} takes no connection: {_why(error)}"
            return _ended(AgentEnd.LAUNCH_FAILED, began, fault=fault)
        except (aiohttp.ClientError, OSError) as error:
            reason = f"the service broke off: {type(error).__name__}: {error}"
            return _ended(AgentEnd.REFUSED, began, reason=reason)
        if not 200 <= status < 300:
            shown = " ".join(text[:_SHOWN_CHARACTERS].split())
            reason = f"the service answered with HTTP {status}: {shown}".rstrip(": ")
            return _ended(AgentEnd.REFUSED, began, text, cut, reason=reason)
        return _ended(AgentEnd.EXITED, began, text, cut, exit_code=0)

    async def _read(self, reply: aiohttp.ClientResponse) -> tuple[str, bool]:
        """(text, whether it is cut) of a reply, which is read to its end."""
        limit, kept, size = self._config.max_output_bytes, bytearray(), 0
        async for chunk in reply.content.iter_any():
            kept += chunk[: limit - len(kept)]
            size += len(chunk)
        return kept.decode("utf-8", "replace"), size > limit

    def _live_session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise InfrastructureError(f"agent {self._config.name}: the launcher is closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # How many at a time is the rollout workers' to say, and how long the attempt's.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None),
                # What one attempt is told to keep is no other's.
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _why(error: aiohttp.ClientConnectorError) -> str:
    """Why a connection could not be made, in the system's words where it has some."""
    number = error.errno or 0
    plain = number > 0 and not isinstance(error, aiohttp.ClientSSLError)
    return os.strerror(number) if plain else error.strerror or str(error)


def _ended(
    end: AgentEnd,
    began: float,
    text: str = "",
    truncated: bool = False,
    exit_code: int | None = None,
    fault: str = "",
    reason: str = "",
) -> AgentResult:
    return AgentResult(
        end=end,
        exit_code=exit_code,
        signal=None,
        stdout=text,
        stderr="",
        seconds=time.monotonic() - began,
        warm=False,
        truncated=truncated,
        fault=fault,
        reason=reason,
    )


def check_service(config: AgentConfig) -> None:
    """Raises UserError for a service that cannot be asked, or a setting that has no hold on one."""
    service = config.service
    try:
        parts = urlsplit(service.url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError("agent.service.url must be http(s)://HOST[:PORT]/PATH; correct it")
    if parts.username is not None or parts.password is not None:
        raise UserError(
            "agent.service.url holds a name or a password; give them as a header: "
            "agent.service.headers.Authorization"
        )
    if service.method not in _METHODS:
        raise UserError(f"agent.service.method={service.method}: must be {' or '.join(_METHODS)}")
    if service.timeout_s is not None and service.timeout_s <= 0:
        raise UserError(f"agent.service.timeout_s={service.timeout_s}: must be above 0, or null")
    for name, value in service.headers.items():
        if not _HEADER_NAME.fullmatch(name) or set(value) & set("\r\n\0"):
            raise UserError(f"agent.service.headers: {name!r} is no header, or its value none")
    fresh = AgentConfig()
    for name in _A_PROCESS:
        if getattr(config, name) != getattr(fresh, name):
            raise UserError(
                f"agent.{name} is for an agent that is started here; a service has settings of its "
                "own, so leave it out"
            )
