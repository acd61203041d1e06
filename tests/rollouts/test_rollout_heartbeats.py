"""Spans as heartbeats: a real queue and a real store, through a restart of the queue."""

import asyncio
import os
import signal
from pathlib import Path

import ray

from lightning_ray.rollouts import RolloutsConfig, RolloutSpec, ask_async, start_queue
from lightning_ray.spans import SpanKind, SpansConfig, span, start_store

SILENCE_S = 4.0


def test_spans_keep_an_attempt_alive_and_revive_it_also_after_the_queue_died(
    ray_cluster: None, tmp_path: Path
) -> None:
    store = start_store(str(tmp_path / "spans"), SpansConfig())
    queue = start_queue("run", RolloutsConfig(), tmp_path / "rollouts", store)
    actor = queue.actor

    async def run() -> None:
        spec = RolloutSpec("r", "task", {}, 600.0, silence_s=SILENCE_S, max_attempts=3)
        await actor.enqueue.remote([spec])
        lease = await actor.dequeue.remote(10, "worker")
        place = {"run_id": "run", "rollout_id": "r", "attempt_id": lease.attempt_id}

        async def tell() -> None:
            await store.append([span(SpanKind.AGENT_STEP, "step", **place)])

        async def process() -> int:
            found: int = await ask_async(
                lambda: actor.__ray_call__.remote(lambda self: os.getpid()), 60, "say who it is"
            )
            return found

        async def until(standing: str, timeout_s: float) -> None:
            async with asyncio.timeout(timeout_s):
                while getattr(await actor.counts.remote(), standing) != 1:
                    await asyncio.sleep(0.2)

        os.kill(await process(), signal.SIGKILL)
        await process()
        for _ in range(8):
            await tell()
            await asyncio.sleep(SILENCE_S / 5)
            assert (await actor.counts.remote()).running == 1
        # Nothing more: it is unresponsive, and its rollout waits for another attempt.
        await until("queued", 30)
        await tell()
        await until("running", 30)
        counts = await actor.counts.remote()
        assert (counts.attempts, counts.queued) == (1, 0)

    asyncio.run(run())
    ray.kill(actor)
    store.close()
