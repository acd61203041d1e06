"""`make bench-spans`: the span store and the queue against agentlightning 0.3.0, and alone.

    make bench-spans
    make bench-spans ARGS="--only append read --rounds 5"

What each claim measures, and how both sides are kept comparable, is in docs/benchmarks.md. A run
with every claim writes benchmarks/results/spans.json; timings never make it fail.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from lightning_ray.cluster import quiet_environment

quiet_environment()

from benchmarks import against_peer, alone, report, under_test, workload  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.peer import Helper, Peer  # noqa: E402
from benchmarks.peer_environment import peer_python  # noqa: E402
from benchmarks.report import Claim  # noqa: E402

PEER = "agentlightning"

HTTP_INGEST = Claim("http_ingest", "spans/s", 50)
HTTP_INGEST_ARROW = Claim("http_ingest_arrow", "spans/s", None)
HTTP_INGEST_OTLP = Claim("http_ingest_otlp", "spans/s", None)
HTTP_INGEST_SAME_ROUTE = Claim("http_ingest_same_route", "spans/s", None)
APPEND = Claim("append", "spans/s", 4)
APPEND_ARROW = Claim("append_arrow", "spans/s", None)
READ = Claim("read", "rollouts/s", 50)
READ_ALLOCATED = Claim("read_allocated_bytes", "bytes", 0, cost=True)
LIFECYCLE = Claim("lifecycle", "rollouts/s", 10)
LOOKUP_GROWTH = Claim("lookup_growth", "times, 1,000,000 spans over 10,000", 2, cost=True)
MEMORY = Claim("memory_mb", "MB beyond the object store", 300, cost=True)
BYTES_PER_TURN = Claim("bytes_per_turn", "times, 64 turns over 8", 1.1, cost=True)
SHARDS = Claim("shards", "spans/s with 4 shards; ratio over 1", None)

CLAIMS = [
    HTTP_INGEST,
    HTTP_INGEST_ARROW,
    HTTP_INGEST_OTLP,
    HTTP_INGEST_SAME_ROUTE,
    APPEND,
    APPEND_ARROW,
    READ,
    READ_ALLOCATED,
    LIFECYCLE,
    LOOKUP_GROWTH,
    MEMORY,
    BYTES_PER_TURN,
    SHARDS,
]


def peer_of(bench: Bench) -> Helper:
    """The peer's process."""

    def make() -> Helper:
        return Peer(peer_python(PEER, bench.say), "agentlightning_spans.py")

    peer = bench.helper(PEER, make)
    bench.packages[PEER] = peer.ready
    return peer


def bench_append(bench: Bench) -> None:
    """Durable append in process, against the peer's memory."""
    peer = peer_of(bench)
    size = {"first": 0, "spans": 16_384, "batch": workload.SPANS_PER_BATCH, "clients": 4}
    measured = bench.alternate(
        "append",
        "spans/s",
        {
            "ours, rows": bench.in_folder(lambda at: against_peer.append_rows(at, **size)),
            "ours, arrow": bench.in_folder(lambda at: against_peer.append_arrow(at, **size)),
            "peer": lambda: peer.rate("append", **size),
        },
    )
    bench.results += [
        report.compared(APPEND, measured["ours, rows"], measured["peer"]),
        report.compared(APPEND_ARROW, measured["ours, arrow"], measured["peer"]),
    ]


def bench_http(bench: Bench) -> None:
    """Batches through the door, against the peer's HTTP client and its OTLP route."""
    peer = peer_of(bench)
    bench.need_ray()
    batch = workload.SPANS_PER_BATCH
    size = {"batch": batch, "clients": 4}
    # The peer needs seconds for what takes us tenths: it gets fewer, and the rate is compared.
    many, few = 32 * batch, 4 * batch
    first = 0

    def numbers(spans: int) -> int:
        """Calls that were not sent before: the door stays up, and a span is stored once."""
        nonlocal first
        first += spans
        return first - spans

    with bench.folder() as folder, under_test.running_door(folder) as door:

        def post(form: str) -> Callable[[], float]:
            # The first request of a form also imports what reads it.
            against_peer.http_ingest(door, numbers(batch), batch, **size, form=form)
            return lambda: against_peer.http_ingest(door, numbers(many), many, **size, form=form)

        measured = bench.alternate(
            "http_ingest",
            "spans/s",
            {
                **{f"ours, {form}": post(form) for form in ("recorded", "arrow", "otlp")},
                "peer": lambda: peer.rate("http_ingest", first=0, spans=few, **size),
                "peer, otlp": lambda: peer.rate("otlp_ingest", first=0, spans=few, **size),
            },
        )
    otlp = measured["ours, otlp"]
    bench.results += [
        report.compared(HTTP_INGEST, measured["ours, recorded"], measured["peer"]),
        report.compared(HTTP_INGEST_ARROW, measured["ours, arrow"], measured["peer"]),
        report.compared(HTTP_INGEST_OTLP, otlp, measured["peer"]),
        report.compared(HTTP_INGEST_SAME_ROUTE, otlp, measured["peer, otlp"]),
    ]


def bench_read(bench: Bench) -> None:
    """1,000 rollouts for training, against the peer's query over HTTP."""
    peer = peer_of(bench)
    bench.need_ray()
    allocated: list[int] = []

    def ours(folder: Path) -> float:
        rate, more = against_peer.read(folder, rollouts=1000)
        allocated.append(more)
        return rate

    measured = bench.alternate(
        "read",
        "rollouts/s",
        {
            "ours": bench.in_folder(ours),
            "peer": lambda: peer.rate("read", rollouts=1000, clients=16),
        },
    )
    bench.facts["read_allocated_bytes"] = allocated
    bench.results += [
        report.compared(READ, measured["ours"], measured["peer"]),
        report.alone(READ_ALLOCATED, max(allocated)),
    ]


def bench_lifecycle(bench: Bench) -> None:
    """Enqueue, dequeue, finish over the network, against the peer's HTTP client."""
    peer = peer_of(bench)
    bench.need_ray()
    clients = 64
    measured = bench.alternate(
        "lifecycle",
        "rollouts/s",
        {
            "ours": bench.in_folder(lambda at: against_peer.lifecycle(at, 2000, clients)),
            "peer": lambda: peer.rate("lifecycle", rollouts=400, clients=clients),
        },
    )
    bench.results.append(report.compared(LIFECYCLE, measured["ours"], measured["peer"]))


def bench_growth(bench: Bench) -> None:
    """Lookups and memory at 1,000,000 spans."""
    bench.need_ray()
    few, many = 10_000, 1_000_000
    with bench.folder() as small, bench.folder() as large:
        bench.say(f"filling a store with {few:,} spans, and one with {many:,}")
        before = alone.grow(small, few, lookups=200, clients=8)
        after = alone.grow(large, many, lookups=200, clients=8)
        took: dict[str, list[float]] = {"10,000 spans": [], "1,000,000 spans": []}
        for turn in range(bench.rounds):
            took["10,000 spans"].append(alone.lookup_ms(small, few, lookups=300))
            took["1,000,000 spans"].append(alone.lookup_ms(large, many, lookups=300))
            said = ", ".join(f"{key} {report.number(ms[-1])}" for key, ms in took.items())
            bench.say(f"lookup_growth {turn + 1}/{bench.rounds}: {said} ms a lookup")
    bench.facts["lookup_growth"] = {
        "ms_in_process": took,
        "ms_through_client": [before.through_client_ms, after.through_client_ms],
    }
    bench.facts["memory_mb"] = {
        "no spans": after.empty,
        "10,000 spans": before.memory,
        "1,000,000 spans": after.memory,
    }
    memory = after.memory
    bench.say(
        f"memory_mb: {memory['own']:.0f} MB of its own and {memory['file']:.0f} MB of files; "
        f"{after.empty['beyond_object_store']:.0f} MB in all before the first span"
    )
    low, high = (statistics.median(ms) for ms in took.values())
    bench.results += [
        report.alone(LOOKUP_GROWTH, high / low),
        report.alone(MEMORY, memory["beyond_object_store"]),
    ]


def bench_turns(bench: Bench) -> None:
    """Bytes on disk of a turn, of long rollouts over short ones."""
    sizes = {}
    for turns in (8, 64):
        with bench.folder() as folder:
            sizes[turns] = alone.bytes_per_turn(folder, turns, calls=4096)
    bench.say(f"bytes_per_turn: {sizes[8]:.0f} bytes at 8 turns, {sizes[64]:.0f} at 64")
    bench.facts["bytes_per_turn"] = {f"{turns} turns": size for turns, size in sizes.items()}
    bench.results.append(report.alone(BYTES_PER_TURN, sizes[64] / sizes[8]))


def bench_shards(bench: Bench) -> None:
    """Ingest with four shards over one."""
    bench.need_ray()
    measured: dict[int, list[float]] = {1: [], 4: []}
    for turn in range(bench.rounds):
        for count in (1, 4) if turn % 2 == 0 else (4, 1):
            with bench.folder() as folder:
                measured[count].append(alone.shards(folder, count, spans=192_000, clients=8))
        said = ", ".join(f"{count}: {report.number(r[-1])}" for count, r in measured.items())
        bench.say(f"shards {turn + 1}/{bench.rounds}: {said} spans/s")
    bench.facts["shards"] = {str(count): rates for count, rates in measured.items()}
    one, four = (statistics.median(measured[count]) for count in (1, 4))
    bench.results.append(report.alone(SHARDS, four, four / one))


SPANS = Benchmark(
    name="spans",
    about=__doc__.splitlines()[0],
    claims=CLAIMS,
    parts={
        "append": bench_append,
        "http_ingest": bench_http,
        "read": bench_read,
        "lifecycle": bench_lifecycle,
        "bytes_per_turn": bench_turns,
        "growth": bench_growth,
        "shards": bench_shards,
    },
    packages=["ray", "pyarrow"],
    room=4 * 10**9,
    object_store_mib=1024,
)

if __name__ == "__main__":
    sys.exit(SPANS.main())
