"""Outcomes read with SQL, against reading them span by span."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from evaluation_support import ROLLBACK_WORDS, attempt, call, deciding, make, spans, table
from hypothesis import given, settings

from lightning_ray.errors import UserError
from lightning_ray.evaluation.outcomes import (
    ROLLBACK_ATTRIBUTE,
    Outcome,
    Usage,
    is_rollback,
    read_outcomes,
)
from lightning_ray.spans import SpanKind, SpanStatus

ROLLBACKS = {"undo_last", "db.rollback", "RollbackOrder"}


def obvious(rows: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """What `read_outcomes` must find, one span at a time."""
    found = []
    for rollout_id, attempt_id in sorted(deciding(rows).items()):
        fields: dict[str, Any] = {"rewards": {}, "verdicts": ()}
        tools = good = 0
        observed = rolled_back = False
        for row in rows:
            if row["attempt_id"] != attempt_id:
                continue
            said = json.loads(row["attributes"] or "{}")
            mark = said.get(ROLLBACK_ATTRIBUTE)
            observed = observed or mark is not None
            rolled_back = rolled_back or mark is True
            if row["kind"] == "resource":
                fields |= {"task_id": said["task_id"], "status": said["status"]}
                fields |= {"task": json.dumps(said["task"], sort_keys=True)}
                fields["output"] = said["stdout"]
            elif row["kind"] == "reward" and not math.isnan(row["value"]):
                fields["rewards"][row["name"]] = row["value"]
            elif row["kind"] in ("tool_call", "agent_step"):
                observed = True
                rolled_back = rolled_back or row["name"] in ROLLBACKS
                tools += row["kind"] == "tool_call"
                good += row["kind"] == "tool_call" and row["status"] == "ok"
            elif row["kind"] == "feedback" and row["name"] != "seen":
                fields["verdicts"] += (row["name"],)
        cost, usage = obvious_cost([row for row in rows if row["rollout_id"] == rollout_id])
        found.append(
            Outcome(
                rollout_id,
                attempt_id,
                **fields,
                tool_calls=tools,
                tool_calls_ok=good,
                observed=observed,
                rolled_back=rolled_back,
                cost_usd=cost,
                usage=usage,
            )
        )
    return found


def obvious_cost(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, tuple[Usage, ...]]:
    costs: list[float] = []
    calls = prompt = sampled = 0
    for row in rows:
        said = json.loads(row["attributes"] or "{}")
        if "cost_usd" in said:
            costs.append(said["cost_usd"])
        elif row["kind"] == "model_call":
            calls += 1
            prompt += 0 if said["choice"] else said["prompt_tokens"]
            sampled += len(row["logprobs"])
    usage = (Usage("policy", prompt, sampled, 0),) if calls else ()
    return (sum(costs) if costs else None), usage


@settings(max_examples=40)
@given(spans())
def test_outcomes_are_what_reading_span_by_span_finds(rows: list[dict[str, Any]]) -> None:
    found = read_outcomes(table(rows), rollback_words=ROLLBACK_WORDS)
    assert found == obvious(rows)


def test_the_tenth_attempt_is_later_than_the_ninth() -> None:
    rows = [
        *attempt("r/9", "t", {"reward": 1.0}),
        *attempt("r/10", "t", status="failed"),
        *attempt("r/2", "t", {"reward": 1.0}),
    ]
    (found,) = read_outcomes(table(rows))
    assert (found.attempt_id, found.rewards, found.failed) == ("r/10", {}, True)


def test_the_last_value_of_a_reward_counts() -> None:
    rows = [
        *attempt("r/1", "t", {"reward": 0.0}),
        make(SpanKind.REWARD, "reward", "r/1", value=1.0),
        make(SpanKind.REWARD, "reward", "r/1", value=math.nan),
    ]
    (found,) = read_outcomes(table(rows))
    assert found.rewards == {"reward": 1.0}


def test_an_agents_word_on_itself_overrules_nobody() -> None:
    rows = [
        *attempt("r/1", "t", {"reward": 0.0}),
        make(SpanKind.REWARD, "reward", "r/1", value=1.0, source="agent"),
        make(SpanKind.REWARD, "style", "r/1", value=1.0, source="agent"),
        make(SpanKind.REWARD, "reward", "r/1", value=1.0, source="person", step=3),
        make(SpanKind.FEEDBACK, "accept", "r/1", source="agent"),
        make(SpanKind.FEEDBACK, "override", "r/1", source="person"),
    ]
    (found,) = read_outcomes(table(rows))
    assert found.rewards == {"reward": 0.0, "style": 1.0} and found.verdicts == ("override",)


def test_telemetry_of_a_call_costs_nothing_twice_and_of_a_tool_once() -> None:
    rows = [
        *attempt("r/1", "t", {"reward": 1.0}),
        call("r/1", prompt_tokens=3, cost_usd=0.5),
        make(SpanKind.MESSAGE, "chat", "r/1", cost_usd=0.5, input_tokens=3, source="agent"),
        make(SpanKind.AGENT_STEP, "invoke_agent", "r/1", cost_usd=0.5, source="agent"),
        make(SpanKind.TOOL_CALL, "execute_tool x", "r/1", tool="undo", cost_usd=0.25),
    ]
    (found,) = read_outcomes(table(rows), rollback_words=ROLLBACK_WORDS)
    assert (found.cost_usd, found.usage) == (0.75, ())
    # A tool's own name tells what it does, whatever its span is called.
    assert found.rolled_back and found.tool_calls == 1


def test_a_rollout_that_left_no_span_is_failed() -> None:
    rows = attempt("a/1", "t", {"reward": 1.0})
    found = read_outcomes(table(rows), rollout_ids=["lost", "a"])
    assert [(o.rollout_id, o.failed) for o in found] == [("lost", True), ("a", False)]


def test_traffic_without_an_attempt_span_is_no_failure() -> None:
    (found,) = read_outcomes(table([call("chat/1", prompt_tokens=3)]))
    assert found.status is None and not found.failed


def test_a_condition_chooses_whole_rollouts_by_their_latest_attempt() -> None:
    rows = [
        *attempt("a/1", "t1", {"reward": 1.0}),
        call("a/1", prompt_tokens=1),
        *attempt("b/1", "t2", {"reward": 0.5}),
        *attempt("b/2", "t2", {"reward": 0.0}),
    ]
    spans_ = table(rows)

    def chosen(where: str) -> list[str]:
        return [outcome.rollout_id for outcome in read_outcomes(spans_, where=where)]

    (found,) = read_outcomes(spans_, where="version = 1 -- the calls alone")
    assert (found.rollout_id, found.rewards) == ("a", {"reward": 1.0})
    assert chosen("attributes->>'task_id' = 't2'") == ["b"]
    assert chosen("name = 'reward' AND value = 0.5") == []
    assert chosen("true") == ["a", "b"]


@pytest.mark.parametrize("where", ["vers = 1", "version = ", "version = 1; DROP TABLE spans"])
def test_a_condition_that_cannot_be_read_is_a_users_mistake(where: str) -> None:
    with pytest.raises(UserError, match=r"where=.*cannot be run"):
        read_outcomes(table(attempt("a/1", "t")), where=where)


def test_telemetry_gives_tokens_under_its_own_names() -> None:
    usage = {"gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 3}
    rows = [
        make(SpanKind.MODEL_CALL, "chat", policy="api", attributes=usage),
        make(SpanKind.MODEL_CALL, "chat", policy="api"),
        make(
            SpanKind.MODEL_CALL,
            "chat",
            policy="upstream",
            attributes={"usage": {"input_tokens": 5, "output_tokens": 2}, "cost_usd": None},
        ),
    ]
    (found,) = read_outcomes(table(rows))
    assert found.usage == (Usage("api", 7, 3, 1), Usage("upstream", 5, 2, 0))


def test_a_rollback_is_known_by_a_word_of_its_name() -> None:
    words = ["undo", "Rollback"]
    assert all(is_rollback(n, words) for n in ("undo", "db.rollback", "UndoOrder", "UNDO_2"))
    assert not any(is_rollback(n, words) for n in ("undocumented", "redo", "search", ""))


def test_an_aborted_tool_call_did_not_succeed() -> None:
    rows = [make(SpanKind.TOOL_CALL, "search", status=status) for status in SpanStatus]
    (found,) = read_outcomes(table(rows))
    assert (found.tool_calls, found.tool_calls_ok) == (3, 1)
