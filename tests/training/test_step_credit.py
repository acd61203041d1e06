"""What a step's batch learns from where attempts are worth more than their one reward."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_step_batches import ALGORITHM, calls, ends, record

from lightning_ray.algorithms import LossConfig
from lightning_ray.errors import UserError
from lightning_ray.spans import SpanKind, span, to_batch
from lightning_ray.training.batches import make_batch
from lightning_ray.trajectories import CreditConfig


def test_named_rewards_are_weighed_and_an_attempt_without_one_is_left_out() -> None:
    records = [record("a", "g", 0.0, brief=1.0), record("b", "g", 0.0, brief=0.0)]
    records += [record("c", "g", 0.0)]
    rows = [row for n, name in enumerate("abc") for row in calls(f"{name}/1", [n])] + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)])
    credit = CreditConfig({"reward": 1.0, "brief": 2.0})
    # The reward alone is constant, what the attempts are worth is not.
    _, batch = make_batch(records, spans, ALGORITHM, "policy", credit=credit)
    assert batch.advantages == {"a/1": 1.0, "b/1": -1.0} and batch.left_out == 1


def test_a_reward_that_the_agent_gave_counts_and_one_that_nobody_gave_is_refused() -> None:
    records = [record("a", "g", 0.0), record("b", "g", 0.0)]
    rows = calls("a/1", [1]) + calls("b/1", [2]) + ends(records)
    for name, value in (("a", 1.0), ("b", 0.0)):
        place = {"run_id": "run", "rollout_id": name, "attempt_id": f"{name}/1"}
        given = span(SpanKind.REWARD, "brief", value=value, source="agent", **place)
        rows.append({**given, "sequence": 9})
    spans = pa.Table.from_batches([to_batch(rows)])
    credit = CreditConfig({"reward": 1.0, "brief": 2.0})
    _, batch = make_batch(records, spans, ALGORITHM, "policy", credit=credit)
    assert batch.advantages == {"a/1": 1.0, "b/1": -1.0}
    with pytest.raises(UserError, match=r"credit.rewards.brevity: no attempt .* brief, reward"):
        make_batch(records, spans, ALGORITHM, "policy", credit=CreditConfig({"brevity": 1.0}))


def test_an_algorithm_is_not_asked_about_a_batch_without_groups() -> None:
    class Finishing:
        loss = LossConfig()

        def score_group(self, group: Any) -> Any:
            return group.rewards

        def finish_batch(self, groups: Any, credits: Any) -> Any:
            return np.split(np.concatenate(credits), len(groups))

    records = [record("a", "g", 1.0), record("b", "g", 1.0)]
    rows = calls("a/1", [1]) + calls("b/1", [2]) + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)])
    _, batch = make_batch(records, spans, Finishing(), "policy")
    assert (batch.rows, batch.flat_groups) == (0, 1)


def test_each_call_has_its_own_credit_where_steps_have_rewards() -> None:
    records = [record("a", "g", 1.0), record("b", "g", 1.0)]
    rows = calls("a/1", [1], [2]) + calls("b/1", [3], [4]) + ends(records)
    place = {"run_id": "run", "rollout_id": "a", "attempt_id": "a/1"}
    given = span(SpanKind.REWARD, "progress", value=1.0, step=0, source="grader", **place)
    spans = pa.Table.from_batches([to_batch([*rows, {**given, "sequence": 9}])])
    credit = CreditConfig(steps={"progress": 1.0})
    sequences, batch = make_batch(records, spans, ALGORITHM, "policy", credit=credit)
    by_call = {
        (row["attempt_id"], max(row["calls"])): row["advantages"][-1]
        for row in sequences.to_pylist()
    }
    # Worth 2, 1, 1 and 1; their mean is the baseline of all.
    assert by_call == {("a/1", 0): 0.75, ("a/1", 1): -0.25, ("b/1", 0): -0.25, ("b/1", 1): -0.25}
    assert batch.advantages == {"a/1": 0.25, "b/1": -0.25}


def test_a_role_with_rewards_of_its_own_is_compared_with_itself() -> None:
    records = [record("a", "g", 1.0, plan=0.0), record("b", "g", 0.0, plan=4.0)]
    rows = []
    for name in "ab":
        first, second = calls(f"{name}/1", [1], [2])
        rows += [{**first, "role": "planner"}, {**second, "role": "solver"}]
    spans = pa.Table.from_batches([to_batch(rows + ends(records))])
    credit = CreditConfig(roles={"planner": {"plan": 1.0}})
    sequences, batch = make_batch(records, spans, ALGORITHM, "policy", credit=credit)
    found = {
        (row["attempt_id"], max(row["calls"])): row["advantages"][-1]
        for row in sequences.to_pylist()
    }
    assert found == {("a/1", 0): -2.0, ("b/1", 0): 2.0, ("a/1", 1): 0.5, ("b/1", 1): -0.5}
    assert batch.used_groups == 2


def test_what_is_cut_moves_no_baseline_and_is_counted() -> None:
    records = [record("a", "g", 1.0), record("b", "g", 0.0)]
    rows = calls("a/1", [1] * 30) + calls("b/1", [2]) + ends(records)
    spans = pa.Table.from_batches([to_batch(rows)])
    sequences, batch = make_batch(records, spans, ALGORITHM, "policy", most_tokens=10)
    assert [row["attempt_id"] for row in sequences.to_pylist()] == ["b/1"]
    assert batch.advantages == {"a/1": 0.5, "b/1": -0.5}
    assert (batch.cut.calls, batch.cut.tokens, batch.rows) == (1, 30, 1)
