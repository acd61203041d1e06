import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.evaluation import (
    Interval,
    TaskScores,
    completion_quality,
    heldout_scores,
    paired,
    paired_difference,
    unpaired,
)
from lightning_ray.spans import SpanKind, span, to_batch
from lightning_ray.spans.segment import SUFFIX, SegmentWriter


def outcomes(successes: int, n: int) -> Interval:
    return completion_quality([1.0] * successes + [0.0] * (n - successes))


def test_the_unpaired_interval_is_newcombes() -> None:
    # Newcombe 1998, table II, method 10, case (a): 56/70 against 48/80.
    found = unpaired("reward", outcomes(48, 80), outcomes(56, 70)).interval
    assert (found.mean, found.n) == (pytest.approx(0.2), 70)
    assert (found.low, found.high) == (
        pytest.approx(0.0524, abs=5e-5),
        pytest.approx(0.3339, abs=5e-5),
    )


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_the_unpaired_interval_holds_its_difference_and_turns_round(
    n: int, m: int, data: st.DataObject
) -> None:
    first = outcomes(data.draw(st.integers(0, n)), n)
    second = outcomes(data.draw(st.integers(0, m)), m)
    there = unpaired("reward", first, second).interval
    back = unpaired("reward", second, first).interval
    assert there.low <= there.mean <= there.high
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))
    assert unpaired("reward", first, first).interval.low <= 0


def test_a_mean_without_a_spread_gives_an_unbounded_difference() -> None:
    single = completion_quality([0.3])
    found = unpaired("reward", single, outcomes(5, 10)).interval
    assert (found.low, found.high) == (-math.inf, math.inf)


def scores(rewards: dict[str, float], contents: dict[str, str] | None = None) -> TaskScores:
    return TaskScores({"reward": rewards}, contents or {})


def test_tasks_are_paired_by_id_and_the_rest_is_counted() -> None:
    first = scores({"a": 0.0, "b": 1.0, "c": 0.0, "only": 1.0})
    second = scores({"c": 1.0, "b": 1.0, "a": 0.5})
    found = paired("reward", first, second, same_source=True)
    assert found is not None and found.paired
    assert found.unmatched == 1
    assert found.interval == paired_difference([0.0, 1.0, 0.0], [0.5, 1.0, 1.0])
    assert paired("format", first, second, same_source=True) is None


def test_the_same_id_is_the_same_task_only_with_the_same_content_or_source() -> None:
    one = scores({"a": 0.0, "b": 0.0, "c": 0.0}, {"a": "1", "b": "2", "c": "3"})
    two = scores({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": "1", "b": "2", "c": "other"})
    found = paired("reward", one, two, same_source=True)
    assert found is not None and (found.interval.n, found.unmatched) == (2, 1)
    bare = scores({"a": 1.0, "b": 1.0})
    assert paired("reward", one, bare, same_source=False) is None
    assert paired("reward", one, bare, same_source=True) is not None


def rollout(
    name: str, task: str, rewards: dict[str, float], at: int, fault: str = ""
) -> list[dict]:
    place = {"run_id": "r", "rollout_id": name, "attempt_id": f"{name}/1"}
    times = {"start_ns": at, "end_ns": at}
    attributes = {"task_id": task, "task": {"question": task}, "error": fault}
    rows = [span(SpanKind.RESOURCE, "attempt", **place, **times, attributes=attributes)]
    return rows + [
        span(SpanKind.REWARD, key, **place, **times, value=value) for key, value in rewards.items()
    ]


def test_scores_are_read_from_the_spans_of_the_last_evaluation_of_each_step(tmp_path: Path) -> None:
    rows = [
        *rollout("s00001-abc-0000-00", "trained", {"reward": 9.0}, 1),
        *rollout("heldout-s00000-abc-0000-00", "t1", {"reward": 9.0}, 2),
        *rollout("heldout-s00000-def-0000-00", "t1", {"reward": 0.0, "exact": 1.0}, 5),
        *rollout("heldout-s00000-def-0000-01", "t1", {"reward": 1.0}, 6),
        *rollout("heldout-s00000-def-0001-00", "t2", {}, 7, fault="lost"),
        *rollout("heldout-s00012-def-0000-00", "t1", {"reward": 1.0}, 9),
    ]
    writer = SegmentWriter(tmp_path / f"00000001{SUFFIX}")
    for start in range(0, len(rows), 3):
        writer.append(to_batch(rows[start : start + 3]))
    writer.close()
    found = heldout_scores(tmp_path)
    assert set(found) == {0, 12}
    # A rollout that a fault lost is in no mean; t1's two samples are one task.
    assert found[0].rewards == {"reward": {"t1": 0.5}, "exact": {"t1": 1.0}}
    assert json.loads(found[0].contents["t2"]) == {"question": "t2"}
    assert heldout_scores(tmp_path / "nowhere") == {}
