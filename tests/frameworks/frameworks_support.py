"""The examples of `examples/frameworks`, and one running stack that any of them can be run on."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from engine_witness import FILE

from lightning_ray.agents import AgentConfig, check_agent, load_tasks
from lightning_ray.jobs.compose import compose_config
from lightning_ray.rollouts import RolloutRecord, RolloutSpec, WorkerGroup
from lightning_ray.spans import SpanKind, whole_requests
from lightning_ray.tracking import Progress
from lightning_ray.training import Parts, RunFolder, TrainConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "frameworks"
ENVIRONMENTS = ROOT / ".frameworks"
ATTEMPTS = 2
"""Runs of each example: two, so that one can be credited against the other."""
MODELS = ["gpt-4o-mini", "gpt-4o", "claude-haiku-4-5"]

# A framework that reports to its maker is told not to.
QUIET = {
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TRACKING": "true",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "ANONYMIZED_TELEMETRY": "False",
    "AUTOGEN_DISABLE_RUNTIME_TRACING": "true",
}


@dataclass(frozen=True)
class Example:
    """One agent, and what is to be seen of it."""

    name: str
    """The folder of its environment and its file."""
    file: str = "agent.py"
    paths: tuple[str, ...] = ("/v1/chat/completions",)
    """The protocols that it speaks."""
    roles: tuple[str, ...] = ("gpt-4o-mini",)
    """The model names that it asks for."""
    streamed: bool = False
    """Whether some of its calls are streamed."""
    tools: tuple[str, ...] = ("add",)
    """The tools that its requests offer in the protocol's own field."""
    must_call: bool = True
    """Whether its framework can be told that the model has to call a tool, so that it does."""
    tool_role: bool = True
    """Whether it gives results of tools in the protocol's own form; else as text of its own."""
    env: dict[str, str] = field(default_factory=dict)
    """What it needs beside what every attempt has."""

    @property
    def id(self) -> str:
        """As a test's parameter."""
        stem = Path(self.file).stem
        return self.name if stem == "agent" else f"{self.name}-{stem}"

    @property
    def command(self) -> list[str]:
        """As `agent.command`."""
        script = str(FOLDER / self.name / self.file)
        by = {".sh": "sh", ".mjs": "node"}
        program = by.get(Path(self.file).suffix, str(ENVIRONMENTS / self.name / "bin/python"))
        return [program, script, "{question}"]


def make_environment(name: str) -> str | None:
    """Makes the environment of an example if it has one; why not, when it cannot be made."""
    if name == "curl":
        return None if shutil.which("curl") else "curl is not installed"
    command = [sys.executable, str(FOLDER / "environments.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    return done.stderr.strip() or "no reason" if done.returncode else None


@dataclass(frozen=True)
class Seen:
    """What one example's runs left behind."""

    records: list[RolloutRecord]
    spans: pa.Table
    witnessed: list[dict[str, Any]]
    """What the engine's worker held of each request, in the order in which they left it."""

    @property
    def attempts(self) -> list[str]:
        return [record.attempt_id for record in self.records]

    def calls(self) -> list[dict[str, Any]]:
        """The model calls as the store has them."""
        return [r for r in self.spans.to_pylist() if r["kind"] == SpanKind.MODEL_CALL.value]

    def exchanges(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Each call as the door saw it: the request's conversation and tools, and the reply."""
        whole = whole_requests(self.spans)
        rows = [r for r in self.spans.to_pylist() if r["kind"] == SpanKind.MESSAGE.value]
        return [(whole[r["span_id"]], json.loads(r["attributes"])["reply"]) for r in rows]


class Stack:
    """Store, queue, engine, learner and gateway; workers are started for each example."""

    def __init__(self, config: TrainConfig, parts: Parts, witness: Path):
        self.config = config
        self.parts = parts
        self._witness = witness
        self._read = 0

    def run(self, example: Example) -> Seen:
        """Runs an example on the first tasks, and waits for everything that it leaves behind."""
        folder = self._witness.parent / example.id
        folder.mkdir(exist_ok=True)
        agent = AgentConfig(
            name=example.id,
            command=example.command,
            # Folders of its own: a framework may write where it runs, or remember answers at home.
            cwd=str(folder),
            env={"HOME": str(folder), **QUIET, **example.env},
            grader=f"{FOLDER / 'grader.py'}:grade",
            timeout_s=240,
            # What is measured is the agent as its author would start it.
            warm_start=False,
        )
        tasks = load_tasks(FOLDER / "tasks.jsonl")[:ATTEMPTS]
        check_agent(agent, tasks)
        specs = [
            RolloutSpec(
                f"{example.id}-{task.id}-{time.time_ns():x}",
                task.id,
                task.data,
                agent.timeout_s,
                # A model of this size may write an argument that no tool can take, hand over to and
                # fro, or not come to an end; some frameworks give up then.
                max_attempts=4,
                max_faults=0,
                note_messages=True,
            )
            for task in tasks
        ]
        workers = WorkerGroup(
            self.config.rollouts, agent, self.parts.queue, self.parts.store, self.parts.url
        )
        try:
            self.parts.queue.enqueue(specs)
            limit = 4 * agent.timeout_s + 60
            records = self.parts.queue.wait([spec.rollout_id for spec in specs], limit)
        finally:
            workers.stop()
        assert len(records) == len(specs), f"{example.id}: not all runs ended within {limit:.0f} s"
        spans = self.parts.store.get([a for record in records for a, _ in record.attempts])
        calls = sum(kind == SpanKind.MODEL_CALL.value for kind in spans["kind"].to_pylist())
        return Seen(records, spans, self._witnessed(calls))

    def _witnessed(self, least: int) -> list[dict[str, Any]]:
        """The lines since the last time; a request is written in the engine's step after its last.

        Waits up to 20 s for `least` of them.
        """
        deadline = time.monotonic() + 20
        while True:
            content = self._witness.read_text() if self._witness.exists() else ""
            lines = content.splitlines()[self._read :]
            if len(lines) >= least or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        self._read += len(lines)
        return [json.loads(line) for line in lines]


@contextmanager
def running_stack(base: Path, folder: Path) -> Iterator[Stack]:
    """The parts of a training job on the real model, with a second record in the engine."""
    witness = folder / "witness.jsonl"
    settings = [
        "experiment=calculator",
        f"gateway.models=[{','.join(MODELS)}]",
        # Frameworks' own prompts are long.
        "inference.max_model_len=8192",
        "inference.tool_call_parser=hermes",
        f"inference.chat_template={FOLDER / 'chat_template.jinja'}",
        # A model of this size writes arguments that fit their schema only where it must.
        "+inference.extra.tool_strict_level=parameter",
        "+inference.extra.logits_processors=['engine_witness:EngineWitness']",
        f"+inference.extra.additional_config={{{FILE}: '{witness}'}}",
        "rollouts.slots_per_worker=2",
        "learner.learning_rate=1e-6",
        # So that what both runs begin with, which is most of it, is computed once.
        "learner.tokens_per_row=4096",
    ]
    config: TrainConfig = compose_config("train", TrainConfig, settings)
    parts = Parts(config, RunFolder(folder / "frameworks"), base, Progress(1, mode="plain"))
    try:
        parts.start(work=False)
        yield Stack(config, parts, witness)
    finally:
        parts.stop()


def tokens_of(calls: list[dict[str, Any]]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and sampled tokens of each of the witness's lines."""
    return Counter((tuple(call["prompt"]), tuple(call["sampled"])) for call in calls)
