"""A training run over several Ray nodes, what of it can be killed, and how soon it is back."""

import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.nodes import Nodes
from benchmarks.peer_environment import ROOT
from lightning_ray.spans import read_folder
from lightning_ray.spans.schema import ATTEMPT_SPAN
from lightning_ray.training import RunFolder

TASKS, GROUP, STALENESS = 4, 4, 2

DEATHS = {
    "rollouts_node": ("node", "rollouts"),
    "queue": ("process", "ray::RolloutQueue"),
    "engine_node": ("node", "inference"),
    "store_shard": ("process", "ray::_Shard"),
    "gateway": ("process", "ray::ServeReplica"),
    "learner_node": ("node", "learner"),
    "batch_maker": ("process", "ray::BatchMaker"),
    "driver": ("driver", ""),
    "engine_core": ("process", "VLLM::EngineCore"),
}
"""What dies: how, and what of it."""
WITHIN_S = dict.fromkeys(DEATHS, 30.0) | {
    # Those that take an engine's start.
    "engine_node": 60.0,
    "engine_core": 60.0,
    "driver": 60.0,
}
"""How soon each is to be back, seconds, on a machine that starts the run in `USUAL_START_S`."""
USUAL_START_S = 45.0
"""How long a run takes to start where the limits hold as they stand, see `Run.patience`."""

SAID = {
    "rollouts_node": re.compile(r"\d+ rollout workers died and were replaced"),
    "engine_node": re.compile(r"\d+ engines of policy died and are being replaced"),
    "engine_core": re.compile(r"\d+ engines of policy died and are being replaced"),
    "learner_node": re.compile(r"a learner actor was lost.*going on from"),
    "driver": re.compile(r"starting the gateway and the rollout workers \d"),
}
"""What the run says of a death, where what ran before it may go on for a moment."""
GOOD_WITHIN_S = 240.0

_STEP = re.compile(r"step (\d+)/")
_BATCH = re.compile(r"step .*[ (]batch ([\d.]+), learn ([\d.]+), weights ([\d.]+)")


@dataclass(frozen=True)
class Death:
    """What died, and when, seconds since the epoch."""

    name: str
    at: float
    """When it was dead."""


@dataclass
class Run:
    """A training job in a process of its own, and when it said what."""

    folder: Path
    nodes: Nodes
    steps: int
    settings: list[str] = field(default_factory=list)
    said: list[tuple[float, str]] = field(default_factory=list)
    """Lines, each with seconds since the epoch."""
    step: int = 0
    """The last that was done."""
    began: float = 0.0
    """When the job was first started, seconds since the epoch."""

    def start(self, *words: str) -> None:
        """Starts the job, or goes on with it."""
        self.began = self.began or time.time()
        agent = ROOT / "benchmarks/agents/slow_calculator.py"
        program = str(Path(sys.executable).with_name("lightning-ray"))
        self.process = subprocess.Popen(
            [
                program,
                "train",
                *words,
                *self.nodes.settings,
                f"output_dir={self.folder}",
                f'agent.command=[python,{agent},"{{question}}","3","1"]',
                f"training.staleness={STALENESS}",
                f"training.steps={self.steps}",
                f"training.tasks_per_step={TASKS}",
                f"algorithm.group_size={GROUP}",
                # Few, so that one begins as one ends: calls and attempts come all the time.
                "rollouts.slots_per_worker=4",
                "training.checkpoint_every=1",
                "evaluation.tasks=null",
                *self.settings,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self._listening = threading.Thread(
            target=self._listen, args=(self.process.stdout,), daemon=True
        )
        self._listening.start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.said.append((time.time(), line.rstrip()))
            if (found := _STEP.match(line)) is not None:
                self.step = max(self.step, int(found[1]))

    @property
    def run_folder(self) -> RunFolder:
        """What the job has made."""
        (path,) = [path for path in self.folder.iterdir() if (path / "overrides.json").is_file()]
        return RunFolder(path)

    @property
    def output(self) -> str:
        """All that it said."""
        return "\n".join(line for _, line in self.said)

    @property
    def patience(self) -> float:
        """How often `WITHIN_S` a death may take: more than once where starting the run took longer
        than `USUAL_START_S`, for that is what its parts' start takes here."""
        up = next(at for at, line in self.said if SAID["driver"].match(line))
        return max(1.0, (up - self.began) / USUAL_START_S)

    def wait_for_step(self, number: int, within_s: float) -> None:
        """Waits until this step is done. Raises RuntimeError when the job ends or is too slow."""
        self.wait_until(lambda: self.step >= number, within_s, f"step {number}")

    def wait_until(
        self, is_so: Callable[[], bool], within_s: float, what: str, every_s: float = 0.2
    ) -> None:
        """Waits while the job runs. Raises RuntimeError when it ends or is too slow."""
        deadline = time.monotonic() + within_s
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(line for _, line in self.said[-15:])
                raise RuntimeError(f"the run did not come to {what} in {within_s:g} s:\n{tail}")
            time.sleep(every_s)

    def wait(self, within_s: float) -> int:
        """Waits for the job's end; returns its exit code. Raises TimeoutExpired."""
        code = self.process.wait(within_s)
        self._listening.join(10.0)
        return code

    def die(self, name: str) -> Death:
        """Kills it, at once; a node is replaced as an autoscaler would, the driver is resumed."""
        how, what = DEATHS[name]
        if how == "node":
            self.nodes.lose(what)
            death = Death(name, time.time())
            self.nodes.join(what)
        elif how == "process":
            if not self.nodes.kill(what):
                raise RuntimeError(f"there is no {what} to kill")
            death = Death(name, time.time())
        else:
            self.process.kill()
            self.process.wait(30)
            death = Death(name, time.time())
            self.start(f"resume={self.run_folder.run_id}")
        # The next death must not keep the run from making this one good, nor from saying so.
        self.wait_until(
            lambda: math.isfinite(self.recovered([death])[0]), GOOD_WITHIN_S, str(death), 1.0
        )
        return death

    def _said_of(self, death: Death) -> float | None:
        """When the run said that something was done about a death."""
        said = SAID[death.name]
        return next((at for at, line in self.said if at > death.at and said.match(line)), None)

    def recovered(self, deaths: list[Death]) -> list[float]:
        """Seconds from each death until it was made good.

        That is: for the queue, an attempt begins; for the batch maker, how long the next batch was
        waited for; for the learner, the run says that it goes on; for all else a call is answered
        that came after the death, and after the run had said that it mends it where it says so.
        What never was is infinite.
        """
        spans = read_folder(self.run_folder.spans)
        answered = spans.filter((pc.field("kind") == "model_call") & (pc.field("status") == "ok"))
        calls = list(_seconds(answered, "start_ns", "end_ns"))
        attempts = spans.filter(pc.field("name") == ATTEMPT_SPAN)
        found = []
        for death in deaths:
            if death.name == "queue":
                ends = [at for (at,) in _seconds(attempts, "start_ns") if at > death.at]
            elif death.name == "learner_node":
                ends = [at for at in [self._said_of(death)] if at is not None]
            elif death.name == "batch_maker":
                ends = [
                    death.at + min(waited, at - death.at)
                    for at, waited in self._batches()
                    if at > death.at
                ][:1]
            else:
                since = self._said_of(death) if death.name in SAID else death.at
                ends = [] if since is None else [end for begin, end in calls if begin > since]
            found.append(min(ends, default=float("inf")) - death.at)
        return found

    def _batches(self) -> Iterator[tuple[float, float]]:
        """When each step's batch was there, and how long it was waited for."""
        for at, line in self.said:
            if (took := _BATCH.match(line)) is not None:
                batch, learn, weights = map(float, took.groups())
                yield at - learn - weights, batch


def _seconds(spans: pa.Table, *columns: str) -> Iterator[tuple[float, ...]]:
    """Times of spans, seconds since the epoch."""
    return zip(*((at / 1e9 for at in spans[name].to_pylist()) for name in columns), strict=True)
