"""Our side of the claims about the gateway: the door before a stub, real vLLM, agents at work."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.clients import require
from benchmarks.peer_environment import ROOT
from benchmarks.under_test import POLICY, RUN, Door, door_before, leases, running_store
from lightning_ray.agents import AgentConfig, Task, load_tasks
from lightning_ray.gateway import Answerer
from lightning_ray.inference import Attribution, InferenceGroup, attribution_headers
from lightning_ray.jobs.compose import compose_config
from lightning_ray.policies.models import resolve_model
from lightning_ray.rollouts import RolloutsConfig, RolloutSpec, RolloutStatus, WorkerGroup
from lightning_ray.training import TrainConfig

CHAT = "/v1/chat/completions"
ROLLOUT_LIMIT_S = 240.0
WARM_UP_TRIES = 20
FRAMEWORKS = ROOT / "examples" / "frameworks"
ENVIRONMENTS = ROOT / ".frameworks"


def body(number: int, **more: Any) -> str:
    """A chat request as the calculator agent makes it; no two numbers have the same."""
    messages = [
        {"role": "system", "content": "Turn each question into a calculator expression."},
        {"role": "user", "content": "What is 12 plus 30?"},
        {"role": "assistant", "content": "calc(12 + 30)"},
        {"role": "user", "content": f"What is {number} plus 41?"},
    ]
    request = {"model": workload.ASKED_MODEL, "messages": messages, "max_tokens": 20}
    return json.dumps(request | more)


def addresses(door: Door, attempts: int) -> list[str]:
    """Where each of so many running attempts sends its chat requests."""
    return [f"{door.url}/a/{one.capability}{CHAT}" for one in leases(door.queue, attempts)]


@dataclass(frozen=True)
class EngineBehind:
    """A real engine, and the door before it."""

    door: Door
    url: str
    key: str

    def headers(self, attempts: int) -> list[dict[str, str]]:
        """What the door sends along for so many attempts: the engine answers nobody else."""
        return [
            attribution_headers(
                self.key, Attribution(RUN, f"direct-{n}", f"direct-{n}/1", POLICY, CHAT)
            )
            for n in range(attempts)
        ]


@contextmanager
def running_engine(folder: Path) -> Iterator[EngineBehind]:
    """vLLM as `make train` starts it, with the model of the default experiment."""
    config: TrainConfig = compose_config("train", TrainConfig, ["experiment=calculator"])
    model = resolve_model(config.policy.model)
    with running_store(folder / "spans") as store:
        names = [workload.ASKED_MODEL]
        group = InferenceGroup(config.inference, str(model), POLICY, names, 0, store)
        try:
            (url,) = group.wait_ready()
            with door_before(Answerer(POLICY, (url,), group.key), folder, store) as door:
                yield EngineBehind(door, url + CHAT, group.key)
        finally:
            group.stop()


@dataclass(frozen=True)
class Example:
    """An agent of `examples/`, as somebody configures it."""

    config: AgentConfig
    tasks: Sequence[Task]


def openai_example() -> Example:
    """The calculator agent, which uses OpenAI's client and runs in our own environment."""
    folder = ROOT / "examples" / "calculator"
    config = AgentConfig(
        name="calculator",
        command=["python", str(folder / "agent.py"), "{question}"],
        cwd=str(ROOT),
        grader=f"{folder / 'grader.py'}:grade",
    )
    return Example(config, load_tasks(folder / "train.jsonl"))


def langgraph_example() -> Example | None:
    """The LangGraph agent, which has an environment of its own; None where that was not made."""
    python = ENVIRONMENTS / "langgraph" / "bin" / "python"
    script = FRAMEWORKS / "langgraph" / "agent.py"
    if not (python.exists() and script.exists()):
        return None
    config = AgentConfig(
        name="langgraph",
        command=[str(python), str(script), "{question}"],
        cwd=str(ROOT),
        env={"LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false"},
        grader=f"{FRAMEWORKS / 'grader.py'}:grade",
    )
    return Example(config, load_tasks(FRAMEWORKS / "tasks.jsonl"))


class Rollouts:
    """One worker that runs an example behind the door; a context manager."""

    def __init__(self, door: Door, example: Example, warm: bool, slots: int):
        config = RolloutsConfig(slots_per_worker=slots)
        self._door = door
        self._warm = warm
        self._tasks = example.tasks
        agent = replace(example.config, warm_start=warm)
        self._workers = WorkerGroup(config, agent, door.queue, door.store, door.url)
        self._numbers = 0
        self._prefix = f"{agent.name}-{time.time_ns()}"

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.stop()

    def ready(self) -> None:
        """Runs a few, until starts are what is to be measured: libraries learnt, files read."""
        for _ in range(WARM_UP_TRIES):
            if self._run(2) == (2 if self._warm else 0):
                return
        raise RuntimeError(f"no warm start within {2 * WARM_UP_TRIES} rollouts")

    def per_second(self, count: int) -> float:
        """How many rollouts end in a second, of so many that are queued at once."""
        begin = time.perf_counter()
        warm = self._run(count)
        seconds = time.perf_counter() - begin
        require(warm, count if self._warm else 0, "warm starts")
        return count / seconds

    def _run(self, count: int) -> int:
        """Runs so many to their end; returns how many were warm."""
        specs = []
        for _ in range(count):
            task = self._tasks[self._numbers % len(self._tasks)]
            name = f"{self._prefix}-{self._numbers}"
            specs.append(RolloutSpec(name, task.id, dict(task.data), 60.0))
            self._numbers += 1
        self._door.queue.enqueue(specs)
        names = [spec.rollout_id for spec in specs]
        records = self._door.queue.wait(names, ROLLOUT_LIMIT_S)
        good = [one for one in records if one.status is RolloutStatus.SUCCEEDED]
        if len(good) < count:
            errors = {one.outcome.error for one in records if one.outcome and one.outcome.error}
            raise RuntimeError(f"{len(good)} of {count} rollouts succeeded: {errors}")
        return sum(one.outcome is not None and one.outcome.warm for one in good)
