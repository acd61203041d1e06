"""The rollout worker: an actor that launches agents, grades what they did, and reports.

Invariant: the spans that say how an attempt ended and what it was worth are stored before the queue
hears that it ended. A fault of ours (a store that is down, say) is never a reward: the attempt is
reported as a fault, which costs the agent none of its attempts.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from lightning_ray.agents import (
    AgentConfig,
    AgentEnd,
    AgentResult,
    Grader,
    GraderError,
    Launcher,
    Task,
    attempt_environment,
    grade,
    load_grader,
    make_launcher,
)
from lightning_ray.errors import InfrastructureError, LightningRayError
from lightning_ray.rollouts.asking import RETRY_EVERY_S, ask_async
from lightning_ray.rollouts.door import closed
from lightning_ray.rollouts.line import Line
from lightning_ray.rollouts.types import AttemptOutcome, AttemptStatus, Lease
from lightning_ray.spans import SpanClient, SpanKind, SpanStatus, span
from lightning_ray.spans.rewards import GRADER
from lightning_ray.spans.schema import ATTEMPT_SPAN

log = logging.getLogger(__name__)

DEQUEUE_WAIT_S = 10.0
RETIRE_TIMEOUT_S = 3.0
WATCH_S = 60.0
"""How long one question whether an attempt goes on is left with the queue, seconds."""
ASK_TIMEOUT_S = 60.0
"""How long a queue that restarts is waited for."""
DOOR_WAIT_S = 60.0
"""How long a door that is being replaced is waited for, at most."""
FAILURES = frozenset({AttemptStatus.FAILED, AttemptStatus.TIMED_OUT})
SHOWN_CHARACTERS = 2000
"""How much of an agent's output goes into spans and reports."""


class RolloutWorker:
    """The actor's class: `slots` attempts at a time."""

    def __init__(
        self,
        agent: AgentConfig,
        slots: int,
        queue: ActorHandle,
        spans: SpanClient,
        gateway_url: str,
        name: str,
        beat_s: float = 10.0,
    ):
        """`name` is what the queue knows it by; `beat_s`: how often it says that it lives, s."""
        self._beat_s = beat_s
        self._id = name
        self._config = agent
        self._slots = slots
        self._queue = queue
        self._line = Line(queue, ASK_TIMEOUT_S)
        self._spans = spans
        self._gateway_url = gateway_url
        self._running: list[asyncio.Task[None]] = []
        self._draining = False
        self._launcher: Launcher | None = None
        self._grader: Grader | None = None

    async def start(self) -> None:
        """Begins to take work. Raises UserError when the agent or its grader cannot be loaded."""
        self._grader = load_grader(self._config.grader)
        self._launcher = make_launcher(self._config)
        await self._launcher.start()
        self._running = [asyncio.create_task(self._work()) for _ in range(self._slots)]
        self._running.append(asyncio.create_task(self._beat()))

    async def gone(self) -> None:
        """Never returns: who asked is told by Ray when this process has died."""
        await asyncio.Event().wait()

    async def drain(self) -> None:
        """Takes no more work, lets the agents that run come to their own end, and stops."""
        self._draining = True
        await self._retire()
        await asyncio.gather(*self._running[: self._slots], return_exceptions=True)
        await self.stop()

    async def stop(self) -> None:
        """Stops the agents that run, and takes no more work."""
        await self._retire()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._launcher is not None:
            await self._launcher.close()

    async def _retire(self) -> None:
        try:
            async with asyncio.timeout(RETIRE_TIMEOUT_S):
                await self._queue.retire.remote(self._id)
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            log.info("the rollout queue did not hear that this worker stops: %s", error)

    async def _work(self) -> None:
        while not self._draining:
            # The same again when the call is repeated: so nothing is handed out to nobody.
            request = secrets.token_urlsafe(24)
            try:
                lease = await self._line.dequeue(DEQUEUE_WAIT_S, self._id, request)
            except InfrastructureError as error:
                log.error("the rollout queue is gone, this worker slot ends: %s", error)
                return
            if lease is not None:
                await self._attempt(lease)

    async def _beat(self) -> None:
        """Says now and then that this worker lives, also while all its slots are busy."""
        while True:
            try:
                beat = self._queue.beat.remote
                await ask_async(partial(beat, self._id), ASK_TIMEOUT_S, "hear that a worker lives")
            except InfrastructureError as error:
                log.warning("%s", error)
            await asyncio.sleep(self._beat_s)

    async def _attempt(self, lease: Lease) -> None:
        begun = time.time_ns()
        try:
            outcome, result = await self._run(lease)
            if outcome.status in FAILURES and not outcome.fault:
                outcome = await self._unless_closed(lease, outcome, begun)
        except LightningRayError as error:
            # Ours, not the agent's: no reward, and the queue decides about another attempt.
            log.warning("attempt %s failed: %s", lease.attempt_id, error)
            outcome = AttemptOutcome(AttemptStatus.FAILED, error=str(error), fault=True)
            result = None
        except Exception as error:
            # A slot that died of a surprise would be missed by nobody: say it, and go on.
            log.exception("attempt %s failed", lease.attempt_id)
            reason = f"{type(error).__name__}: {error}"
            outcome, result = AttemptOutcome(AttemptStatus.FAILED, error=reason, fault=True), None
        try:
            # What is ours must not lie in the spans as an outcome of the agent's either.
            outcome = await self._line.excuse(lease.attempt_id, outcome)
        except (InfrastructureError, ray.exceptions.RayError) as error:
            log.warning("nobody says whether %s met a fault: %s", lease.attempt_id, error)
        try:
            await self._spans.append(_end_spans(lease, outcome, result, begun))
        except LightningRayError as error:
            log.error("attempt %s could not be recorded: %s", lease.attempt_id, error)
            outcome = AttemptOutcome(AttemptStatus.FAILED, error=str(error), fault=True)
        try:
            await self._line.finish(lease.attempt_id, outcome)
        except InfrastructureError as error:
            log.error("attempt %s could not be reported: %s", lease.attempt_id, error)

    async def _unless_closed(
        self, lease: Lease, outcome: AttemptOutcome, begun: int
    ) -> AttemptOutcome:
        """A failure, or the fault that there was nobody to answer the agent."""
        # Not past the attempt's end: its worker would be overdue, and what it says not heard.
        left = lease.timeout_s - (time.time_ns() - begun) / 1e9
        why = await closed(self._gateway_url, min(DOOR_WAIT_S, max(0.0, left)))
        if not why:
            return outcome
        error = f"{why}\n{outcome.error}".strip()
        return replace(outcome, status=AttemptStatus.FAILED, error=error, fault=True)

    async def _run(self, lease: Lease) -> tuple[AttemptOutcome, AgentResult | None]:
        assert self._launcher is not None and self._grader is not None
        base_url = f"{self._gateway_url}/a/{lease.capability}"
        # The key is no secret: the door looks at the path. Clients refuse to start without one.
        environment = attempt_environment(base_url, api_key="lightning-ray")
        task = Task(lease.task_id, lease.task)
        agent = asyncio.ensure_future(self._launcher.run(task, environment, lease.timeout_s))
        cancelled = asyncio.ensure_future(_watch(self._queue, lease.attempt_id))
        try:
            await asyncio.wait([agent, cancelled], return_when=asyncio.FIRST_COMPLETED)
            if not agent.done():
                return AttemptOutcome(AttemptStatus.CANCELLED), None
            result = agent.result()
        finally:
            for waiting in (agent, cancelled):
                waiting.cancel()
            await asyncio.gather(agent, cancelled, return_exceptions=True)
        status, error = _verdict(result, self._config.graded_exit_codes)
        rewards: dict[str, float] = {}
        if status is AttemptStatus.SUCCEEDED:
            table = await self._spans.fetch([lease.attempt_id])
            try:
                rewards = await asyncio.wait_for(
                    asyncio.to_thread(grade, self._grader, task, result, table),
                    self._config.grader_timeout_s,
                )
            except GraderError as raised:
                status, error = AttemptStatus.FAILED, f"grader: {raised}"
            except TimeoutError:
                # Its thread cannot be stopped, but this slot need not wait for it.
                limit = self._config.grader_timeout_s
                status, error = AttemptStatus.FAILED, f"grader: no answer within {limit:g} s"
        outcome = AttemptOutcome(
            status,
            rewards,
            result=result.output[:SHOWN_CHARACTERS],
            error=error,
            seconds=result.seconds,
            warm=result.warm,
            # It never ran, or what had started it was lost.
            fault=result.end is AgentEnd.LAUNCH_FAILED,
        )
        return outcome, result


async def _watch(queue: ActorHandle, attempt_id: str) -> None:
    while True:
        try:
            # Again and again: Ray may lose a call that meets the queue's death, and not say so.
            waiting = queue.cancelled.remote(attempt_id, WATCH_S)
            if await asyncio.wait_for(waiting, WATCH_S + ASK_TIMEOUT_S):
                return
        except TimeoutError:
            log.info("the rollout queue did not say whether %s goes on; asking again", attempt_id)
        except ray.exceptions.ActorUnavailableError:
            # It restarts, and knows then whether the attempt may go on.
            await asyncio.sleep(RETRY_EVERY_S)


def _verdict(result: AgentResult, graded: Collection[int]) -> tuple[AttemptStatus, str]:
    """What an agent's end means for its attempt, and why when it is not a success."""
    tail = result.stderr.strip()[-SHOWN_CHARACTERS:]
    if result.end is AgentEnd.EXITED and result.exit_code in graded:
        return AttemptStatus.SUCCEEDED, ""
    if result.end is AgentEnd.TIMED_OUT:
        return AttemptStatus.TIMED_OUT, f"stopped after {result.seconds:.0f} s\n{tail}".strip()
    if result.end is AgentEnd.CANCELLED:
        return AttemptStatus.CANCELLED, ""
    if result.end is AgentEnd.KILLED:
        reason = f"killed by signal {result.signal}"
    elif result.end is AgentEnd.LAUNCH_FAILED:
        reason = f"could not be started: {result.fault}"
    else:
        reason = result.reason or f"exit code {result.exit_code}"
    return AttemptStatus.FAILED, f"{reason}\n{tail}".strip()


def _end_spans(
    lease: Lease, outcome: AttemptOutcome, result: AgentResult | None, begun: int
) -> list[dict[str, Any]]:
    """How the attempt ended, and its rewards, as spans."""
    place: dict[str, Any] = {
        "run_id": lease.run_id,
        "rollout_id": lease.rollout_id,
        "attempt_id": lease.attempt_id,
    }
    good = outcome.status is AttemptStatus.SUCCEEDED
    attributes: dict[str, Any] = {
        "task_id": lease.task_id,
        "task": lease.task,
        "group_id": lease.group_id,
        "status": outcome.status.value,
        "stdout": outcome.result,
        "error": outcome.error,
    }
    if result is not None:
        attributes |= {
            "end": result.end.value,
            "exit_code": result.exit_code,
            "seconds": round(result.seconds, 3),
            "cpu_seconds": round(result.cpu_seconds, 3),
            "warm": result.warm,
            "stderr": result.stderr[-SHOWN_CHARACTERS:],
        }
        if result.written is not None:
            attributes |= {"stdout": result.stdout[:SHOWN_CHARACTERS], "output": outcome.result}
    rows = [
        span(
            SpanKind.RESOURCE,
            ATTEMPT_SPAN,
            **place,
            start_ns=begun,
            status=SpanStatus.OK if good else SpanStatus.ERROR,
            attributes=attributes,
        )
    ]
    for name, value in outcome.rewards.items():
        rows.append(span(SpanKind.REWARD, name, **place, value=value, source=GRADER))
    return rows
