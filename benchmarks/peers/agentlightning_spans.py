"""What agentlightning 0.3.0 does with the same spans; run by its own interpreter.

Takes one request a line on standard input, a JSON object {"do": NAME, ...}, and answers each with
one JSON object a line on standard output; anything that the library prints goes to standard error.
Uses the library's public names alone: its in-memory store, its server and its client. The server is
a process of its own (`agentlightning_spans.py serve PORT ROLLOUTS`), started as `agl store` does.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

# Importing the library would otherwise try for seconds to fetch a list of prices.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
sys.path.insert(0, str(Path(__file__).parents[2]))

import agentlightning as agl
import aiohttp
from agentlightning.semconv import LightningResourceAttributes
from agentlightning.types import OtelResource, TraceStatus
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks import otlp, workload
from benchmarks.clients import require, together

logging.disable(logging.WARNING)

SERVER_STARTS_WITHIN_S = 90.0


def span(one: workload.Call, rollout: agl.AttemptedRollout, sequence: int) -> agl.Span:
    """The call as the library's own span, as its tracer and its `from_opentelemetry` make it."""
    return agl.Span.from_attributes(
        attributes=workload.attributes(one),
        rollout_id=rollout.rollout_id,
        attempt_id=rollout.attempt.attempt_id,
        sequence_id=sequence,
        name="openai.chat.completion",
        trace_id=one.trace_id,
        span_id=one.span_id,
        start_time=one.start_ns / 1e9,
        end_time=one.end_ns / 1e9,
        resource=OtelResource(attributes={"service.name": "agent"}, schema_url=""),
        status=TraceStatus(status_code="OK"),
    )


async def rollouts_of(
    store: agl.LightningStore, first: int, count: int, spans_each: int
) -> list[list[agl.Span]]:
    """`count` calls from `first` as lists of spans, one per rollout, each rollout running."""
    made = []
    for calls in workload.batches(workload.calls(first, count), spans_each):
        rollout = await store.start_rollout(input={"task": calls[0].number})
        made.append([span(one, rollout, number) for number, one in enumerate(calls, 1)])
    return made


async def append(first: int, spans: int, batch: int, clients: int) -> dict[str, Any]:
    """`add_many_spans` of the in-memory store, in this process."""
    store = agl.InMemoryLightningStore()
    rollouts = await rollouts_of(store, first, spans, workload.SPANS_PER_ROLLOUT)
    flat = [one for rollout in rollouts for one in rollout]

    async def add(piece: list[agl.Span]) -> None:
        require(len(await store.add_many_spans(piece)), len(piece), "spans stored")

    seconds = await together(add, list(workload.batches(flat, batch)), clients)
    return {"units": spans, "seconds": seconds}


async def http_ingest(first: int, spans: int, batch: int, clients: int) -> dict[str, Any]:
    """`add_many_spans` of the HTTP client; each batch belongs to one attempt."""
    async with served(0) as client:
        pieces = await rollouts_of(client, first, spans, batch)

        async def send(piece: list[agl.Span]) -> None:
            stored = await client.add_many_spans(piece)
            require(len(stored), len(piece), "spans stored")

        seconds = await together(send, pieces, clients)
    return {"units": spans, "seconds": seconds}


async def otlp_ingest(first: int, spans: int, batch: int, clients: int) -> dict[str, Any]:
    """The server's OTLP route, a batch a request, each of one attempt; the store does the same."""
    async with served(0) as client, aiohttp.ClientSession() as session:
        requests = []
        for calls in workload.batches(workload.calls(first, spans), batch):
            rollout = await client.start_rollout(input={"task": calls[0].number})
            requests.append(otlp_request(calls, rollout))

        async def send(request: ExportTraceServiceRequest) -> None:
            body = request.SerializeToString()
            headers = {"content-type": "application/x-protobuf"}
            async with session.post(
                client.otlp_traces_endpoint(), data=body, headers=headers
            ) as reply:
                require(reply.status, 200, "as the status of an export")

        seconds = await together(send, requests, clients)
        kept = await client.statistics()
        require(kept["total_spans"] or 0, spans, "spans stored")
    return {"units": spans, "seconds": seconds}


def otlp_request(
    calls: list[workload.Call], rollout: agl.AttemptedRollout
) -> ExportTraceServiceRequest:
    """The calls as an export of the library's own exporter, which names the attempt."""
    resource = {
        "service.name": "agent",
        LightningResourceAttributes.ROLLOUT_ID.value: rollout.rollout_id,
        LightningResourceAttributes.ATTEMPT_ID.value: rollout.attempt.attempt_id,
    }
    return otlp.export_request(calls, resource)


async def read(rollouts: int, clients: int) -> dict[str, Any]:
    """`query_spans` of the HTTP client, rollout by rollout, several at a time."""
    async with served(rollouts) as client:
        found = await client.query_rollouts(limit=-1)
        ids = [one.rollout_id for one in found.items]
        require(len(ids), rollouts, "rollouts")

        async def fetch(rollout_id: str) -> None:
            page = await client.query_spans(rollout_id)
            require(len(page.items), workload.SPANS_PER_ROLLOUT, "spans of a rollout")

        seconds = await together(fetch, ids, clients)
    return {"units": rollouts, "seconds": seconds}


async def lifecycle(rollouts: int, clients: int) -> dict[str, Any]:
    """Enqueue, dequeue, finish: three calls of the HTTP client for each rollout."""
    async with served(0) as client:

        async def live(number: int) -> None:
            await client.enqueue_rollout(input={"question": f"What is {number} plus 30?"})
            taken = await client.dequeue_rollout(worker_id=f"worker-{number % clients}")
            if taken is None:
                raise RuntimeError("nothing to dequeue after an enqueue")
            await client.update_attempt(
                taken.rollout_id, taken.attempt.attempt_id, status="succeeded"
            )

        seconds = await together(live, list(range(rollouts)), clients)
        ended = await client.query_rollouts(status_in=["succeeded"], limit=-1)
        require(len(ended.items), rollouts, "rollouts succeeded")
    return {"units": rollouts, "seconds": seconds}


@contextlib.asynccontextmanager
async def served(rollouts: int) -> AsyncIterator[agl.LightningStoreClient]:
    """A client of a fresh server in a process of its own, with `rollouts` rollouts stored."""
    with server_process(rollouts) as port:
        client = agl.LightningStoreClient(f"http://127.0.0.1:{port}")
        try:
            yield client
        finally:
            await client.close()


@contextlib.contextmanager
def server_process(rollouts: int) -> Iterator[int]:
    """Starts the server; yields its port once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "serve", str(port), str(rollouts)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())
    try:
        deadline = time.monotonic() + SERVER_STARTS_WITHIN_S
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no server in {SERVER_STARTS_WITHIN_S:g} s") from error
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


async def serve(port: int, rollouts: int) -> None:
    """The store and its server, as `agl store` runs them."""
    store = agl.InMemoryLightningStore(thread_safe=True)
    count = rollouts * workload.SPANS_PER_ROLLOUT
    for spans in await rollouts_of(store, 0, count, workload.SPANS_PER_ROLLOUT):
        await store.add_many_spans(spans)
        # Ended, as rollouts are that one trains on: the store's watch over running ones is no part
        # of a read.
        await store.update_attempt(spans[0].rollout_id, spans[0].attempt_id, status="succeeded")
    server = agl.LightningStoreServer(store, host="127.0.0.1", port=port, launch_mode="asyncio")
    await server.run_forever()


DO: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
    "append": append,
    "http_ingest": http_ingest,
    "otlp_ingest": otlp_ingest,
    "read": read,
    "lifecycle": lifecycle,
}


def main() -> None:
    """Answers requests until standard input ends, or serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["serve"])
    parser.add_argument("numbers", nargs="*", type=int)
    arguments = parser.parse_args()
    if arguments.what == "serve":
        asyncio.run(serve(*arguments.numbers))
        return
    # What the library prints must not stand between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({"ready": agl.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = asyncio.run(DO[request.pop("do")](**request))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
