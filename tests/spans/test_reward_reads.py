"""Which rewards hold, against the obvious way."""

import math
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.spans import SpanKind, span, to_batch
from lightning_ray.spans.rewards import by_attempt, reward_history, rewards, whole_attempt

Given = tuple[str, str, int | None, float | None, str | None]


def reward(one: Given, sequence: int) -> dict[str, Any]:
    attempt, name, step, value, source = one
    place = {"run_id": "run", "rollout_id": attempt.partition("/")[0], "attempt_id": attempt}
    made = span(SpanKind.REWARD, name, **place, value=value, step=step, source=source)
    return {**made, "sequence": sequence}


GIVEN = st.lists(
    st.tuples(
        st.sampled_from(["a/1", "a/2", "b/1"]),
        st.sampled_from(["reward", "exact"]),
        st.sampled_from([None, 0, 3]),
        st.sampled_from([0.0, 1.0, -2.5, math.nan, math.inf, None]),
        st.sampled_from([None, "grader", "agent", "service", "person"]),
    ),
    max_size=30,
)


@given(GIVEN, st.randoms(use_true_random=False))
def test_the_last_of_a_name_and_step_holds_and_an_agent_overrules_nobody(
    given: list[Any], chance: Any
) -> None:
    rows = [reward(one, sequence) for sequence, one in enumerate(given, 1)]
    held: dict[tuple[str, str, int | None], tuple[float, str]] = {}
    history = []
    for attempt, name, step, value, source in given:
        if value is None or not math.isfinite(value):
            continue
        source = source or "grader"
        history.append((attempt, name, step, value, source))
        before = held.get((attempt, name, step))
        if before is None or source != "agent" or before[1] == "agent":
            held[attempt, name, step] = (value, source)
    other = span(SpanKind.FEEDBACK, "accept", run_id="run", rollout_id="a", attempt_id="a/1")
    chance.shuffle(rows)
    table = pa.Table.from_batches([to_batch([*rows, other])])
    found = {
        (row["attempt_id"], row["name"], row["step"]): (row["value"], row["source"])
        for row in rewards(table).to_pylist()
    }
    assert found == held and rewards(table).num_rows == len(held)
    names = ("attempt_id", "name", "step", "value", "source")
    kept = [tuple(row[n] for n in names) for row in reward_history(table).to_pylist()]
    assert kept == sorted(history, key=lambda one: one[0])
    whole = {key[:2]: value for key, (value, _) in held.items() if key[2] is None}
    assert whole_attempt(rewards(table)).num_rows == len(whole)
    assert {(a, n): v for a, named in by_attempt(table).items() for n, v in named.items()} == whole


def test_no_spans_have_no_rewards() -> None:
    empty = pa.Table.from_batches([to_batch([])])
    assert rewards(empty).num_rows == 0 and by_attempt(empty) == {}
