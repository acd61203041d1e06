"""Warm starts: a rollout of a Python agent costs a fork, not an interpreter and its imports.

The first run is forked from an empty zygote and reports, when it exits, which libraries it had
imported. A second zygote imports those, and every later run is forked from it. Where the first was
not like the others (it failed early, say), the next ones report what they had to import themselves,
and another zygote has that too, if two of them had.

Invariant: the agent cannot tell. A library for which an early import would make a difference is
left to each run (it reads a variable that attempts set), has its output replayed (it prints), or
makes every start a cold one (it runs a thread); the reason is logged.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Coroutine, Mapping

from lightning_ray.agents.attempt import Attempts
from lightning_ray.agents.command import fill_command, find_executable, python_script
from lightning_ray.agents.config import AgentConfig
from lightning_ray.agents.forkserver import ForkServer
from lightning_ray.agents.job import Job
from lightning_ray.agents.launch import CommandLauncher, agent_folder
from lightning_ray.agents.result import AgentEnd, AgentResult
from lightning_ray.agents.task import Task
from lightning_ray.errors import InfrastructureError, UserError

_log = logging.getLogger(__name__)

# How long other first runs wait for the one that learns, rather than all pay for their imports.
LEARN_WAIT_S = 20.0
# Runs that may end without a report (killed, timed out, os._exit) before learning is given up.
LEARN_TRIES = 3
# How many runs report what they have to import, since libraries were last learnt, and how often
# more are learnt from that.
REPORTS = 32
MORE_ROUNDS = 3
# Each round leaves out the modules that the last one found not to be shareable.
PRELOAD_ROUNDS = 5
# A zygote that died this often in a row is not trusted with another fork.
DEATHS = 3
# Read by the interpreter, the C library or a thread pool when they start: too late for a fork.
_STARTUP_VARIABLES = ("PYTHON", "LC_", "LANG", "LD_", "TZ", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_")


class WarmLauncher:
    """A `Launcher` for `python [-u] SCRIPT.py ARG...`; cold where a fork would not be exact."""

    def __init__(self, config: AgentConfig, own_packages: Collection[str] = ()) -> None:
        """`own_packages`: those of the agent's own that lie where libraries do."""
        script = python_script(config.command)
        if script is None:
            raise UserError(
                f"agent.command: {config.command} is not `python [-u] SCRIPT.py ARG...`"
            )
        self._config = config
        self._script = script
        self._cwd = agent_folder(config)
        self._attempts = Attempts(config)
        self._base_env = self._attempts.base_env
        self._cold = CommandLauncher(config, self._attempts)
        self._server: ForkServer | None = None
        self._starting = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._modules: list[str] | None = None
        self._watched: frozenset[str] = frozenset()
        self._learning: asyncio.Future[None] | None = None
        self._left_out = set(own_packages)
        self._reports_left = 0
        self._imported: Counter[str] = Counter()
        self._more_rounds_left = MORE_ROUNDS
        self._more_coming = False
        self._tries_left = LEARN_TRIES
        self._deaths = 0
        self._closed = False
        self.cold_reason = ""
        """Why every run is started cold; empty while they are not."""

    @property
    def preloaded(self) -> tuple[str, ...]:
        """The modules that runs find already imported; empty until they are learnt."""
        return tuple(self._modules or ())

    async def start(self) -> None:
        """See `Launcher.start`."""
        if await self._live_server() is None:
            await self._cold.start()

    async def run(self, task: Task, env: Mapping[str, str], timeout_s: float) -> AgentResult:
        """See `Launcher.run`.

        While the first run learns, others wait for it, up to `LEARN_WAIT_S` and outside their time
        limit: all would pay for the same imports.
        """
        if self._learning is not None:
            await asyncio.wait({self._learning}, timeout=LEARN_WAIT_S)
        server = await self._live_server() if self._shareable(env) else None
        if server is None:
            return await self._cold.run(task, env, timeout_s)
        async with self._attempts.prepared(task, env) as attempt:
            if self._server is not None and self._server.alive:
                server = self._server  # another may have taken its place meanwhile
            job = Job(
                attempt.argv,
                attempt.env,
                fork=True,
                script=self._script.index,
                stdin=attempt.stdin,
                max_memory_mb=self._config.max_memory_mb,
                max_processes=self._config.max_processes,
            )
            if self._modules is None and self._learning is None and self._tries_left > 0:
                result = await self._learn(server, job, env, timeout_s)
            elif self._modules is not None and self._reports_left > 0:
                result = await self._look_for_more(server, job, env, timeout_s)
            else:
                result = await server.run(job, timeout_s, self._config.max_output_bytes)
            if result.end is not AgentEnd.LAUNCH_FAILED:
                self._deaths = 0
            return await attempt.result(result)

    async def _learn(
        self, server: ForkServer, job: Job, env: Mapping[str, str], timeout_s: float
    ) -> AgentResult:
        """Run a job, and have the libraries that it imported made ready for those after it."""
        self._learning = asyncio.get_running_loop().create_future()
        self._tries_left -= 1
        modules = None
        try:
            limit = self._config.max_output_bytes
            result, modules = await server.learn(job, timeout_s, limit)
        finally:
            if modules is None:
                self._learnt()
        if modules is not None:
            self._do_later(self._warm_up(modules, self._may_differ(env)))
        elif self._tries_left == 0:
            _log.warning(
                "agent %s: no run exited normally, so its libraries are not known and each run "
                "imports them",
                self._config.name,
            )
        return result

    async def _look_for_more(
        self, server: ForkServer, job: Job, env: Mapping[str, str], timeout_s: float
    ) -> AgentResult:
        """Run a job; what it and another had to import themselves, those after them will find."""
        self._reports_left -= 1
        result, modules = await server.learn(job, timeout_s, self._config.max_output_bytes)
        self._imported.update(modules or [])
        known = self._modules or []
        there = set(known)
        new = [
            module
            for module, times in self._imported.items()
            if times > 1 and module not in there and not _under(module, self._left_out)
        ]
        if new and self._more_rounds_left > 0 and not self._more_coming and not self._closed:
            self._more_rounds_left -= 1
            self._more_coming = True
            self._do_later(self._warm_up([*known, *new], self._may_differ(env), frozenset(new)))
        return result

    def _may_differ(self, env: Mapping[str, str]) -> frozenset[str]:
        """The variables that any attempt may set."""
        return self._watched | self._attempts.own_names(env)

    async def close(self) -> None:
        """See `Launcher.close`."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._learnt()
        if self._server is not None:
            await self._server.close()
        await self._cold.close()

    def _shareable(self, env: Mapping[str, str]) -> bool:
        """Whether a run with these variables of its own can be a fork."""
        own = self._attempts.own_names(env)
        if self.cold_reason or any(name.startswith(_STARTUP_VARIABLES) for name in own):
            return False
        return self._modules is None or self._watched.issuperset(own)

    def _learnt(self) -> None:
        """Let the runs go on that wait for the one that learns."""
        if self._learning is not None and not self._learning.done():
            self._learning.set_result(None)
        self._learning = None

    async def _live_server(self) -> ForkServer | None:
        """The current zygote, a new one in its place if it died; None if there is to be none."""
        async with self._starting:
            if self._closed:
                raise InfrastructureError(f"agent {self._config.name}: the launcher is closed")
            if self.cold_reason or (self._server is not None and self._server.alive):
                return None if self.cold_reason else self._server
            if self._server is not None:
                await self._server.close()
                self._deaths += 1
                _log.warning("agent %s: its warm process died", self._config.name)
            if self._deaths >= DEATHS:
                self._give_up(f"its warm process died {self._deaths} times")
                return None
            self._server = self._make_server(self._modules or [], self._watched)
            try:
                await self._server.start()
            except InfrastructureError as error:
                self._give_up(str(error))
                return None
            return self._server

    def _make_server(self, modules: list[str], watched: frozenset[str]) -> ForkServer:
        python = find_executable(
            fill_command(self._config.command[:1], Task("", {}))[0], self._base_env, self._cwd
        )
        return ForkServer(
            [python, *self._script.flags],
            self._base_env,
            self._cwd,
            script=self._script.script,
            preload=modules,
            watch=sorted(watched),
            scratch=self._attempts.folder(),
        )

    async def _warm_up(
        self, modules: list[str], watched: frozenset[str], more: frozenset[str] = frozenset()
    ) -> None:
        """Replace the zygote by one that has imported the modules, as far as they can be shared.

        Without one, starts are cold; or, where the last of them are `more` than were learnt before,
        as they were.
        """
        try:
            reason = await self._replace(modules, watched, more)
            if reason and more:
                self._more_rounds_left = self._reports_left = 0
                _log.info("agent %s: its libraries stay as learnt: %s", self._config.name, reason)
            elif reason:
                self._give_up(reason)
        finally:
            self._more_coming = False
            self._learnt()

    async def _replace(
        self, modules: list[str], watched: frozenset[str], more: frozenset[str]
    ) -> str:
        """Why the modules cannot be shared; empty where they are, and the zygote is replaced."""
        left_out = set(self._left_out)
        for _ in range(PRELOAD_ROUNDS):
            wanted = [m for m in modules if not _under(m, left_out)]
            server = self._make_server(wanted, watched)
            try:
                ready = await server.start()
            except InfrastructureError as error:
                return str(error)
            # Not every run imports those, and so not every run prints what they print.
            unlike = more.intersection(ready.printed)
            if ready.threads == 1 and not ready.tainted and not unlike:
                for module, reason in ready.failed.items():
                    _log.info("agent %s: not preloaded: %s", module, reason)
                self._left_out = left_out | set(ready.failed)
                await self._adopt(server, wanted, watched)
                return ""
            await server.close()
            if ready.threads > 1:
                return f"its libraries run {ready.threads - 1} threads from their import on"
            left_out.update(ready.tainted, unlike)
            names = sorted({*ready.tainted, *unlike})
            _log.info("agent %s: left to each run: %s", self._config.name, names)
        return "its libraries depend on the attempt when they are imported"

    async def _adopt(self, server: ForkServer, modules: list[str], watched: frozenset[str]) -> None:
        try:
            # Not while a dead one is being replaced: one of the two would be forgotten.
            async with self._starting:
                old, self._server = self._server, server
        except asyncio.CancelledError:
            await server.close()
            raise
        self._modules, self._watched = modules, watched
        self._reports_left = REPORTS if self._more_rounds_left > 0 else 0
        self._imported.clear()
        if old is not None:
            self._do_later(_retire(old))

    def _give_up(self, reason: str) -> None:
        self.cold_reason = reason
        _log.warning("agent %s is started cold: %s", self._config.name, reason)

    def _do_later(self, work: Coroutine[None, None, None]) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _retire(server: ForkServer) -> None:
    """End a zygote once its runs have ended; when that is not to be waited for, with them."""
    try:
        await server.close(kill=False)
    except asyncio.CancelledError:
        await server.close()
        raise


def _under(module: str, packages: set[str]) -> bool:
    """Whether a module is one of the packages or inside of one."""
    return any(module == p or module.startswith(f"{p}.") for p in packages)
