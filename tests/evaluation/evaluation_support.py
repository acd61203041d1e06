"""Synthetic spans, as an attempt's worker, its agent's telemetry and people would leave them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from lightning_ray.evaluation.outcomes import ROLLBACK_ATTRIBUTE
from lightning_ray.spans import SpanKind, SpanStatus, span, to_batch

ROLLBACK_WORDS = ("undo", "rollback")


def make(kind: SpanKind, name: str, attempt_id: str = "r/1", **columns: Any) -> dict[str, Any]:
    """One span of an attempt."""
    rollout_id = attempt_id.rpartition("/")[0]
    return span(kind, name, run_id="run", rollout_id=rollout_id, attempt_id=attempt_id, **columns)


def attempt(
    attempt_id: str,
    task_id: str,
    rewards: Mapping[str, float] | None = None,
    *,
    status: str = "succeeded",
    output: str = "",
    task: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """How an attempt ended: its span and its rewards."""
    said = {"task_id": task_id, "task": task or {"id": task_id}, "status": status, "stdout": output}
    ended = make(SpanKind.RESOURCE, "attempt", attempt_id, attributes=said)
    named = (rewards or {}).items()
    return [ended] + [make(SpanKind.REWARD, n, attempt_id, value=v) for n, v in named]


def call(attempt_id: str = "r/1", sampled: int = 2, **attributes: Any) -> dict[str, Any]:
    """A model call that sampled so many tokens."""
    return make(
        SpanKind.MODEL_CALL,
        "/v1/chat/completions",
        attempt_id,
        policy="policy",
        version=1,
        token_ids=[1] * (sampled + 1),
        logprobs=[-0.5] * sampled,
        attributes=attributes,
    )


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """The rows as the store would number them, in order of arrival."""
    numbers: Counter[str] = Counter()
    numbered = []
    for row in rows:
        numbers[row["attempt_id"]] += 1
        numbered.append({**row, "sequence": numbers[row["attempt_id"]]})
    return pa.Table.from_batches([to_batch(numbered)])


def spans() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Any spans of a few rollouts with several attempts each, in any order of arrival."""
    places = st.builds(
        "{}/{}".format, st.sampled_from(["a", "b", "run/c", "d"]), st.integers(1, 11)
    )
    one = st.one_of(
        st.builds(_resource, places, st.sampled_from(["succeeded", "failed", "timed_out"])),
        st.builds(_reward, places, st.sampled_from(["reward", "exact"]), _VALUES),
        st.builds(_step, places, _NAMES, st.booleans(), st.sampled_from(list(SpanStatus)), _MARKS),
        st.builds(_message, places, _MARKS, _COSTS),
        st.builds(_feedback, places, st.sampled_from(["accept", "correct", "override", "seen"])),
        st.builds(_call, places, st.integers(0, 4), st.integers(0, 2), st.integers(1, 9), _COSTS),
    )
    return st.lists(one, max_size=40)


_VALUES = st.one_of(st.sampled_from([0.0, 1.0, float("nan")]), st.floats(-2, 2))
_NAMES = st.sampled_from(["search", "undo_last", "db.rollback", "RollbackOrder", "undocumented"])
_MARKS = st.sampled_from([None, True, False])
_COSTS = st.sampled_from([None, 0.25, 3])


def _resource(place: str, status: str) -> dict[str, Any]:
    task = f"t-{place[0]}"
    return make(
        SpanKind.RESOURCE,
        "attempt",
        place,
        attributes={
            "task_id": task,
            "task": {"b": 1, "a": task},
            "status": status,
            "stdout": place,
        },
    )


def _reward(place: str, name: str, value: float) -> dict[str, Any]:
    return make(SpanKind.REWARD, name, place, value=value)


def _step(
    place: str, name: str, tool: bool, status: SpanStatus, mark: bool | None
) -> dict[str, Any]:
    kind = SpanKind.TOOL_CALL if tool else SpanKind.AGENT_STEP
    attributes = {} if mark is None else {ROLLBACK_ATTRIBUTE: mark}
    return make(kind, name, place, status=status, attributes=attributes)


def _message(place: str, mark: bool | None, cost: float | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {} if mark is None else {ROLLBACK_ATTRIBUTE: mark}
    attributes |= {} if cost is None else {"cost_usd": cost}
    return make(SpanKind.MESSAGE, "undo", place, attributes=attributes)


def _feedback(place: str, name: str) -> dict[str, Any]:
    return make(SpanKind.FEEDBACK, name, place, attributes={"by": "somebody"})


def _call(place: str, sampled: int, choice: int, prompt: int, cost: float | None) -> dict[str, Any]:
    costs = {} if cost is None else {"cost_usd": cost}
    return call(place, sampled, choice=choice, prompt_tokens=prompt, **costs)


def deciding(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By rollout, its latest attempt: the obvious way."""
    latest: dict[str, tuple[int, str]] = {}
    for row in rows:
        number = int(row["attempt_id"].split("/")[-1])
        latest[row["rollout_id"]] = max(
            latest.get(row["rollout_id"], (0, "")), (number, row["attempt_id"])
        )
    return {rollout_id: attempt_id for rollout_id, (_, attempt_id) in latest.items()}
