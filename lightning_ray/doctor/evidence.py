"""What the checks judge: the runs of one agent, its requests and its spans, as plain values."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lightning_ray.agents import AgentConfig
from lightning_ray.doctor.exchange import Exchange
from lightning_ray.spans import SpanKind
from lightning_ray.spans.rewards import by_attempt


@dataclass(frozen=True)
class Run:
    """How one attempt went, as its own span tells."""

    attempt_id: str
    task_id: str
    end: str
    """A value of `AgentEnd`; empty when the agent was never started."""
    exit_code: int | None
    seconds: float
    cpu_seconds: float | None
    warm: bool
    stdout: str
    """Its result: what it printed, or wrote to its result file."""
    stderr: str
    error: str
    """Why the attempt did not succeed; empty when it did."""
    rewards: dict[str, float] = field(default_factory=dict)
    graded_exit_codes: Sequence[int] = (0,)
    """Exit codes that are no failure."""

    @property
    def finished(self) -> bool:
        """Whether the agent ended by itself and well, whatever its grader made of it."""
        return self.end == "exited" and self.exit_code in self.graded_exit_codes


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that was seen of one agent."""

    agent: AgentConfig
    runs: Sequence[Run]
    exchanges: Sequence[Exchange]
    """In the order in which the agent asked."""
    spans: pa.Table
    """Rows of SPAN_SCHEMA, those of `runs`."""
    graded: bool = False
    """Whether the rewards are a grader's of the user."""
    given: Sequence[str] = ()
    """Variables by which an attempt says where model calls go."""
    hosts: Sequence[str] = ()
    """Other hosts that it tried to reach, looked for when no call arrived."""
    left_behind: Sequence[str] = ()
    """Processes that outlived their run, each as a report names it."""
    ours: frozenset[str] = frozenset()
    """Names of the variables in the environment that the command was typed in."""
    chat_template: str | None = None
    """The model's; None where it is not known."""
    max_model_len: int = 2048
    cores: int = 1

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The model calls, `attributes` parsed, in the order of attempt and sequence."""
        rows = _rows(self.spans, SpanKind.MODEL_CALL)
        return sorted(rows, key=lambda row: (row["attempt_id"], row["sequence"]))

    @property
    def answered(self) -> list[Exchange]:
        """The requests that got what they asked for."""
        return [exchange for exchange in self.exchanges if exchange.answered]

    def by_attempt(self) -> dict[str, list[Exchange]]:
        """The answered requests that carry messages, by attempt."""
        grouped: dict[str, list[Exchange]] = defaultdict(list)
        for exchange in self.answered:
            if exchange.asked.messages:
                grouped[exchange.attempt_id].append(exchange)
        return grouped


def runs_of(spans: pa.Table, graded_exit_codes: Sequence[int] = (0,)) -> list[Run]:
    """The attempts whose end is in `spans`, in the order of their ids."""
    rewards = by_attempt(spans)
    runs = []
    for row in _rows(spans, SpanKind.RESOURCE):
        told = row["attributes"]
        runs.append(
            Run(
                attempt_id=row["attempt_id"],
                task_id=told.get("task_id", ""),
                end=told.get("end", ""),
                exit_code=told.get("exit_code"),
                seconds=told.get("seconds", 0.0),
                cpu_seconds=told.get("cpu_seconds"),
                warm=bool(told.get("warm")),
                stdout=told.get("output", told.get("stdout", "")),
                stderr=told.get("stderr", ""),
                error=told.get("error", ""),
                rewards=rewards.get(row["attempt_id"], {}),
                graded_exit_codes=graded_exit_codes,
            )
        )
    return sorted(runs, key=lambda run: run.attempt_id)


def _rows(spans: pa.Table, kind: SpanKind) -> list[dict[str, Any]]:
    found = [row for row in spans.to_pylist() if row["kind"] == kind]
    for row in found:
        row["attributes"] = json.loads(row["attributes"] or "{}")
    return found
