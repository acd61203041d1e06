"""What the benchmarks touch of this package, in one place: its spans, store, queue and door."""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray

from benchmarks import workload
from benchmarks.workload import Call
from lightning_ray.gateway import (
    Answerer,
    GatewayConfig,
    LiveDoor,
    ServingConfig,
    choose_port,
    make_roles,
    start_desk,
    start_gateway,
    stop_gateway,
)
from lightning_ray.gateway.desk import digest_of
from lightning_ray.inference import Attribution
from lightning_ray.inference.recorder import CallRecorder, OpenCall
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    RolloutsConfig,
    RolloutSpec,
    start_queue,
)
from lightning_ray.rollouts.line import Line
from lightning_ray.rollouts.types import Lease
from lightning_ray.spans import (
    SPAN_SCHEMA,
    SpanClient,
    SpanKind,
    SpansConfig,
    SpanStatus,
    attempt_id_of,
    span,
    start_store,
    to_batch,
)
from lightning_ray.spans.store import SpanStore

RUN = "bench"
POLICY = "policy"
BULK = "/v1/spans"
TRACES = "/v1/traces"
CALLER = "recorder"
ENGINE_KEY = "what an engine wants to see of the door"


@dataclass(frozen=True)
class Place:
    """Whose spans they are."""

    rollout_id: str
    attempt_id: str


def place(number: int) -> Place:
    """Rollout `number`, at its first attempt."""
    rollout_id = f"rollout-{number:08d}"
    return Place(rollout_id, attempt_id_of(rollout_id, 1))


def row(one: Call, at: Place) -> dict[str, Any]:
    """The call as a row, as the engine's recorder makes it: tokens in columns, once."""
    return span(
        SpanKind.MODEL_CALL,
        "/v1/chat/completions",
        run_id=RUN,
        rollout_id=at.rollout_id,
        attempt_id=at.attempt_id,
        span_id=one.span_id,
        trace_id=one.trace_id,
        start_ns=one.start_ns,
        end_ns=one.end_ns,
        role=workload.ASKED_MODEL,
        policy=POLICY,
        version=1,
        prefix_tokens=0,
        token_ids=np.array(one.prompt_ids + one.sampled_ids, np.int32),
        logprobs=np.array(one.logprobs, np.float32),
        finish_reason="stop",
        model=workload.SERVED_MODEL,
        input_tokens=workload.PROMPT_TOKENS,
        output_tokens=workload.SAMPLED_TOKENS,
        attributes={
            "response_id": f"chatcmpl-{one.span_id}",
            "sampling": {"temperature": 1.0, "max_tokens": workload.SAMPLED_TOKENS},
            "messages": [{"role": "user", "content": one.question}],
            "answer": one.answer,
        },
    )


def rows(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """The calls as rows, SPANS_PER_ROLLOUT of them to a rollout."""
    return [row(one, place(one.number // workload.SPANS_PER_ROLLOUT)) for one in calls]


def telemetry_row(one: Call, at: Place) -> dict[str, Any]:
    """The call as a row that an attempt may send through the door.

    Token columns are the engine's alone to fill, so the tokens are among the attributes, which are
    those of the OTLP export.
    """
    return span(
        SpanKind.AGENT_STEP,
        "openai.chat.completion",
        run_id=RUN,
        rollout_id=at.rollout_id,
        attempt_id=at.attempt_id,
        span_id=one.span_id,
        trace_id=one.trace_id,
        start_ns=one.start_ns,
        end_ns=one.end_ns,
        model=workload.SERVED_MODEL,
        input_tokens=workload.PROMPT_TOKENS,
        output_tokens=workload.SAMPLED_TOKENS,
        attributes=workload.attributes(one),
    )


def batch_of(some: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Rows as the record batch that the store takes."""
    return to_batch(some)


def arrow_body(batch: pa.RecordBatch) -> bytes:
    """A batch as the body of a POST to BULK: one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def with_columns(batch: pa.RecordBatch, columns: dict[str, pa.Array]) -> pa.RecordBatch:
    """The batch with these columns of SPAN_SCHEMA in the place of its own."""
    for name, column in columns.items():
        index = SPAN_SCHEMA.get_field_index(name)
        batch = batch.set_column(index, SPAN_SCHEMA.field(index), column)
    return batch


def open_store(folder: Path) -> SpanStore:
    """One shard in this process, without Ray."""
    return SpanStore(str(folder), SpansConfig())


class Recorder:
    """The engine's recorder of calls, writing to a store in this process."""

    def __init__(self, store: SpanStore):
        async def append_rows(some: Sequence[Mapping[str, Any]]) -> None:
            await store.append(to_batch(some))

        self._recorder = CallRecorder(append_rows)

    async def record(self, at: Place, prompt: list[int], sampled: list[int]) -> None:
        """One call with its whole prompt and what was sampled, a logprob each."""
        by = Attribution(
            RUN, at.rollout_id, at.attempt_id, workload.ASKED_MODEL, "/v1/chat/completions"
        )
        sampling = {"temperature": 1.0, "max_tokens": workload.SAMPLED_TOKENS}
        call = OpenCall(by, POLICY, 1, sampling, prompt_ids=prompt)
        choice = call.choice(0)
        choice.token_ids = sampled
        choice.logprobs = [-0.1 * (token % 17) for token in sampled]
        choice.finish_reason = "stop"
        await self._recorder.record(call, SpanStatus.OK)


@contextmanager
def running_store(folder: Path, shards: int = 1) -> Iterator[SpanClient]:
    """The store as actors, as a run has it; closed at the end."""
    client = start_store(str(folder), SpansConfig(shards=shards))
    try:
        yield client
    finally:
        client.close()


def shard_processes(client: SpanClient) -> list[psutil.Process]:
    """The processes of the store's actors, which run on this machine."""
    asked = [shard.process_id.remote() for shard in client.shards]
    return [psutil.Process(pid) for pid in ray.get(asked, timeout=60)]


def start_lives(folder: Path) -> Any:
    """The queue of rollouts as an actor, with its journal in the folder; the client."""
    return start_queue(RUN, RolloutsConfig(), folder / "rollouts")


async def live_once(line: Line, rollout_id: str, worker: str) -> None:
    """Enqueue, dequeue, finish: a call of the queue each. Raises RuntimeError when one fails.

    `line` is what the slots of one worker share, as the peer's callers share one client.
    """
    task = {"question": f"What is {rollout_id} plus 30?"}
    await line.enqueue([RolloutSpec(rollout_id, rollout_id, task, 600.0)])
    lease = await line.dequeue(10.0, worker, secrets.token_urlsafe(24))
    if lease is None:
        raise RuntimeError("nothing to dequeue after an enqueue")
    outcome = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})
    if not await line.finish(lease.attempt_id, outcome):
        raise RuntimeError(f"the report on {lease.attempt_id} did not count")


def succeeded(queue: Any) -> int:
    """Rollouts that succeeded."""
    return int(queue.counts().succeeded)


def leases(queue: Any, count: int) -> list[Lease]:
    """`count` attempts that are running, each with a capability of the door."""
    queue.enqueue(
        [RolloutSpec(f"ingest-{os.urandom(6).hex()}", "t", {}, 3600.0) for _ in range(count)]
    )
    return ray.get([queue.actor.dequeue.remote(10.0, "") for _ in range(count)], timeout=60)


def stop_lives(queue: Any) -> None:
    """Ends the queue's actor."""
    ray.kill(queue.actor)


@dataclass(frozen=True)
class Door:
    """The gateway on Ray Serve, the queue that lets attempts in, the store behind."""

    url: str
    queue: Any
    store: SpanClient
    key: str
    """Of CALLER, which may send what its own engines recorded."""


@contextmanager
def running_door(folder: Path, engine: str = "http://127.0.0.1:9") -> Iterator[Door]:
    """The gateway as a run has it, in front of what answers at the URL; at this one nobody does."""
    with running_store(folder / "spans") as store:
        with door_before(Answerer(POLICY, (engine,), ENGINE_KEY), folder, store) as door:
            yield door


@contextmanager
def door_before(answerer: Answerer, folder: Path, store: SpanClient) -> Iterator[Door]:
    """The gateway as a run has it, with its queue, in front of who answers."""
    config = GatewayConfig(models=[workload.ASKED_MODEL])
    queue = start_lives(folder)
    key = secrets.token_hex(16)
    desk = start_desk(RUN, {CALLER: digest_of(key)}, 60.0)
    try:
        url = start_gateway(
            config,
            choose_port(config),
            RUN,
            queue.actor,
            make_roles(config, POLICY, [POLICY]),
            [answerer],
            store,
            LiveDoor(desk.actor, ServingConfig(recorders=[CALLER]), RUN),
        )
        yield Door(url, queue, store, key)
    finally:
        stop_gateway(RUN)
        stop_lives(queue)
        ray.kill(desk.actor)
