"""What the checks know of an attempt beside its spans: how it ended, its task, its group.

In training the conductor's records say it; of a folder of spans the attempts' own spans do.
Invariant: every attempt that has a span has exactly one `AttemptFacts`.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.schema import ATTEMPT_SPAN, SpanKind

SUCCEEDED = "succeeded"
"""The status of an attempt that came to an outcome of the agent and was graded."""


@dataclass(frozen=True)
class Place:
    """Where an attempt stands among the others."""

    group: str | None = None
    """Attempts with one group are compared with each other; None: with nobody."""
    batch: str | None = None
    """Groups with one batch are learnt from in the same step; None where that is not known."""
    learnt: bool = True
    """False for attempts that only measure: their tasks are held out on purpose."""


@dataclass(frozen=True)
class AttemptFacts:
    """One attempt."""

    attempt_id: str
    status: str | None
    """As the rollout queue calls it; None where nothing says how it ended."""
    place: Place = Place()
    error: str = ""
    """Why it did not succeed."""
    task_id: str = ""
    task: Mapping[str, Any] | None = None
    """The task's fields; None where they were not recorded."""
    reward: float | None = None
    """What the conductor believes it is worth; None: the spans alone say."""

    @property
    def succeeded(self) -> bool:
        """Whether it came to an outcome and was graded."""
        return self.status == SUCCEEDED


def attempts_of_spans(
    spans: pa.Table, place: Callable[[str, str | None], Place]
) -> list[AttemptFacts]:
    """The facts of every attempt in `spans`, in order of first appearance.

    `place(rollout_id, group_id)` says where an attempt stands; `group_id` is None where the attempt
    did not record it.
    """
    ends: dict[str, dict[str, Any]] = {}
    for row in end_spans(spans):
        ends[row["attempt_id"]] = attributes_of(row)
    seen = spans.select(["attempt_id", "rollout_id"]).group_by("attempt_id", use_threads=False)
    seen = seen.aggregate([("rollout_id", "first")])
    facts = []
    for attempt_id, rollout_id in zip(
        seen["attempt_id"].to_pylist(), seen["rollout_id_first"].to_pylist(), strict=True
    ):
        end = ends.get(attempt_id, {})
        task = end.get("task")
        facts.append(
            AttemptFacts(
                attempt_id,
                end.get("status"),
                place(rollout_id, end.get("group_id") or None),
                error=end.get("error") or "",
                task_id=str(end.get("task_id") or ""),
                task=task if isinstance(task, dict) else None,
            )
        )
    return facts


def recorded_errors(spans: pa.Table) -> dict[str, str]:
    """Attempt id to why it did not succeed, as its own last span says it."""
    ends = {row["attempt_id"]: attributes_of(row).get("error") for row in end_spans(spans)}
    return {attempt: str(error) for attempt, error in ends.items() if error}


def end_spans(spans: pa.Table) -> list[dict[str, Any]]:
    """The spans that say how an attempt ended: attempt_id, status, attributes."""
    mask = pc.and_(
        pc.equal(spans["kind"], SpanKind.RESOURCE.value), pc.equal(spans["name"], ATTEMPT_SPAN)
    )
    return spans.select(["attempt_id", "status", "attributes"]).filter(mask).to_pylist()


def attributes_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A span's attributes; empty where they are missing or no JSON object."""
    try:
        found = json.loads(row["attributes"] or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def task_key(task: Mapping[str, Any]) -> str:
    """Equal for tasks of the same content, whatever their ids and the order of their fields.

    Texts are compared without regard to case, to the width of white space, and to how Unicode
    spells a character (NFKC); 3 and 3.0 are one number.
    """
    content = {name: value for name, value in task.items() if name != "id"}
    text = json.dumps(_normal(content), sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def task_keys(tasks: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Key to id, for (id, fields) of tasks; of equal tasks the first gives its id."""
    keys: dict[str, str] = {}
    for task_id, task in tasks:
        keys.setdefault(task_key(task), task_id)
    return keys


def _normal(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(name): _normal(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    return value
