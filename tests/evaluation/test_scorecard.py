"""The operator's measures, and that none has a number without evidence."""

from typing import Any

import pytest
from evaluation_support import ROLLBACK_WORDS, attempt, call, make, spans, table
from hypothesis import given, settings

from lightning_ray.errors import UserError
from lightning_ray.evaluation.config import EvaluationConfig, MeasuresConfig, check_evaluation
from lightning_ray.evaluation.outcomes import read_outcomes
from lightning_ray.evaluation.scorecard import Scorecard, score
from lightning_ray.spans import SpanKind, SpanStatus

PRICES = {"policy": {"input_per_million": 2.0, "output_per_million": 10.0}}


def card(rows: list[dict[str, Any]], **settings_: Any) -> Scorecard:
    config = EvaluationConfig(**settings_)
    outcomes = read_outcomes(table(rows), rollback_words=config.measures.rollback_words)
    return score(outcomes, config, "spans")


def value(rows: list[dict[str, Any]], name: str, **settings_: Any) -> float:
    interval = card(rows, **settings_).measure(name).interval
    assert interval is not None and interval.low <= interval.mean <= interval.high
    return interval.mean


def missing(rows: list[dict[str, Any]], name: str, **settings_: Any) -> str:
    measure = card(rows, **settings_).measure(name)
    assert measure.interval is None
    return measure.missing


def test_nothing_is_measured_without_evidence() -> None:
    rows = [call(prompt_tokens=4)]
    assert missing(rows, "completion_quality") == "no reward spans"
    assert missing(rows, "tool_discipline") == "no tool_call spans"
    assert missing(rows, "rollback_frequency").startswith("no tool_call or agent_step spans")
    assert missing(rows, "override_rate").startswith("no feedback spans")
    assert missing(rows, "cost_per_resolved", prices=PRICES) == "no reward spans"


def test_completion_quality_leaves_faults_out() -> None:
    rows = [
        *attempt("a/1", "t1", {"reward": 1.0}),
        *attempt("b/1", "t2", {"reward": 0.5}),
        *attempt("c/1", "t3", status="failed"),
    ]
    found = card(rows)
    assert (found.rollouts, found.failed) == (3, 1)
    assert value(rows, "completion_quality") == 0.75


def test_samples_of_one_task_do_not_make_the_interval_narrower() -> None:
    def width(samples: int) -> float:
        rows = [
            row
            for task in range(12)
            for sample in range(samples)
            for row in attempt(f"{task}-{sample}/1", f"t{task}", {"reward": float(task % 2)})
        ]
        interval = card(rows).measure("completion_quality").interval
        assert interval is not None and interval.n == 12 * samples
        return interval.high - interval.low

    # Every sample of a task is the same: twelve tasks are all that is known.
    assert width(10) > 0.9 * width(1)
    assert 0.45 < width(1) < 0.55


def test_tool_discipline_is_the_share_of_calls_that_succeeded() -> None:
    tool = SpanKind.TOOL_CALL
    rows = [
        make(tool, "search", "a/1"),
        make(tool, "search", "a/1", status=SpanStatus.ERROR),
        make(tool, "search", "b/1"),
        make(SpanKind.AGENT_STEP, "plan", "b/1", status=SpanStatus.ERROR),
        make(tool, "search", "c/1"),
    ]
    assert value(rows, "tool_discipline") == 0.75


def test_tool_discipline_may_be_a_reward() -> None:
    rows = [*attempt("a/1", "t", {"reward": 0, "format": 1}), *attempt("b/1", "t", {"format": 0})]
    measures = MeasuresConfig(tool_discipline="reward:format")
    assert value(rows, "tool_discipline", measures=measures) == 0.5
    measures = MeasuresConfig(tool_discipline="reward:shape")
    with pytest.raises(UserError, match=r"tool_discipline=shape: no reward .* reward, format"):
        card(rows, measures=measures)


def test_rollback_frequency_counts_rollouts_whose_steps_are_seen() -> None:
    rows = [
        make(SpanKind.TOOL_CALL, "undo_payment", "a/1"),
        make(SpanKind.TOOL_CALL, "undo_payment", "a/1"),
        make(SpanKind.TOOL_CALL, "pay", "b/1"),
        make(SpanKind.MESSAGE, "m", "c/1", attributes={"lightning_ray.rollback": True}),
        make(SpanKind.MESSAGE, "m", "d/1", attributes={"lightning_ray.rollback": False}),
        *attempt("e/1", "t", {"reward": 1.0}),
    ]
    measure = card(rows).measure("rollback_frequency")
    assert measure.interval is not None
    assert (measure.interval.mean, measure.interval.n) == (0.5, 4)
    measures = MeasuresConfig(rollback_words=["pay"])
    assert value(rows, "rollback_frequency", measures=measures) == 0.5
    measures = MeasuresConfig(rollback_words=["payment", "pay"])
    assert value(rows, "rollback_frequency", measures=measures) == 0.75


def test_override_rate_is_of_the_rollouts_that_somebody_looked_at() -> None:
    feedback = SpanKind.FEEDBACK
    rows = [
        make(feedback, "accept", "a/1"),
        make(feedback, "correct", "b/1"),
        make(feedback, "accept", "c/1"),
        make(feedback, "override", "c/1"),
        make(feedback, "override", "c/1"),
        make(feedback, "seen", "d/1"),
        *attempt("e/1", "t", {"reward": 1.0}),
    ]
    measure = card(rows).measure("override_rate")
    assert measure.interval is not None
    assert (measure.interval.mean, measure.interval.n) == (pytest.approx(1 / 3), 3)


def test_cost_counts_every_attempt_and_the_unresolved() -> None:
    rows = [
        call("a/1", sampled=100, prompt_tokens=1000),
        *attempt("a/1", "t", status="failed"),
        call("a/2", sampled=100, prompt_tokens=1000),
        *attempt("a/2", "t", {"reward": 1.0}),
        make(SpanKind.TOOL_CALL, "search", "b/1", attributes={"cost_usd": 0.5}),
        *attempt("b/1", "t", {"reward": 0.4}),
    ]
    # Two calls of 1,000 tokens in and 100 out at 2 and 10 USD a million, and a search.
    spent = 2 * (1000 * 2 + 100 * 10) / 1e6 + 0.5
    assert value(rows, "cost_per_resolved", prices=PRICES) == pytest.approx(spent)
    assert value(rows, "cost_per_resolved", prices=PRICES, resolved_at=0.4) == pytest.approx(
        spent / 2
    )


def test_a_call_with_a_cost_of_its_own_needs_no_price() -> None:
    rows = [call("a/1", prompt_tokens=9, cost_usd=2.0), *attempt("a/1", "t", {"reward": 1.0})]
    assert value(rows, "cost_per_resolved") == 2.0


def test_whether_a_workflow_is_resolved_is_for_feedback_to_say() -> None:
    def said(attempt_id: str, outcome: str) -> dict[str, Any]:
        return make(SpanKind.FEEDBACK, outcome, attempt_id, source="person")

    rows = [
        *[call(f"{name}/1", prompt_tokens=9, cost_usd=2.0) for name in "abcd"],
        *attempt("a/1", "t", {"reward": 1.0}),
        said("a/1", "resolved"),
        said("a/1", "escalated"),
        *attempt("b/1", "t", {"reward": 0.0}),
        said("b/1", "unresolved"),
        said("b/1", "resolved"),
        *attempt("c/1", "t", {"reward": 1.0}),
        make(SpanKind.FEEDBACK, "unresolved", "c/1", source="agent"),
        said("d/1", "resolved"),
    ]
    # b and d by what was last said, c by its reward; a is not.
    assert value(rows, "cost_per_resolved") == pytest.approx(8.0 / 3)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([call("a/1", prompt_tokens=9)], "no evaluation.prices.policy"),
        ([call("a/1")], "without cost_usd and tokens"),
        ([], "no model_call spans"),
    ],
)
def test_cost_is_not_made_up(rows: list[dict[str, Any]], reason: str) -> None:
    rows = [*rows, *attempt("a/1", "t", {"reward": 1.0})]
    prices = {} if "evaluation.prices" in reason else PRICES
    assert reason in missing(rows, "cost_per_resolved", prices=prices)


def test_no_cost_per_resolved_where_nothing_is_resolved() -> None:
    rows = [call("a/1", prompt_tokens=9), *attempt("a/1", "t", {"reward": 0.9})]
    assert missing(rows, "cost_per_resolved", prices=PRICES) == "none of 1 rollouts is resolved"


def test_a_reward_that_there_is_not() -> None:
    rows = attempt("a/1", "t", {"reward": 1.0, "exact": 0.0})
    with pytest.raises(UserError, match=r"evaluation.reward=score: .* there are reward, exact"):
        card(rows, reward="score")


@settings(max_examples=25)
@given(spans())
def test_measures_are_what_counting_outcomes_gives(rows: list[dict[str, Any]]) -> None:
    outcomes = read_outcomes(table(rows), rollback_words=ROLLBACK_WORDS)
    names = {name for outcome in outcomes for name in outcome.rewards}
    if names and "reward" not in names:
        return
    found = score(outcomes, EvaluationConfig(prices=PRICES), "spans")
    tools = [(o.tool_calls_ok, o.tool_calls) for o in outcomes]
    expected = {
        "tool_discipline": (sum(ok for ok, _ in tools), sum(n for _, n in tools)),
        "rollback_frequency": (
            sum(o.rolled_back for o in outcomes if o.observed),
            sum(o.observed for o in outcomes),
        ),
        "override_rate": (
            sum("override" in o.verdicts for o in outcomes),
            sum(bool(o.verdicts) for o in outcomes),
        ),
        "completion_quality": (
            sum(o.rewards.get("reward", 0) for o in outcomes),
            sum("reward" in o.rewards for o in outcomes),
        ),
    }
    for name, (above, below) in expected.items():
        interval = found.measure(name).interval
        assert (interval is None) == (below == 0)
        if interval is not None:
            assert interval.mean == pytest.approx(above / below) and interval.n == below
    spent = sum(
        (o.cost_usd or 0) + sum(u.input_tokens * 2e-6 + u.output_tokens * 1e-5 for u in o.usage)
        for o in outcomes
    )
    resolved = sum(o.rewards.get("reward", -9) >= 1 for o in outcomes)
    interval = found.measure("cost_per_resolved").interval
    if interval is not None:
        assert interval.mean == pytest.approx(spent / resolved)
        assert interval.low <= interval.mean <= interval.high


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (EvaluationConfig(prices={"p": {"input_per_million": 1.0}}), "output_per_million"),
        (
            EvaluationConfig(prices={"p": {"input_per_million": -1, "output_per_million": 0}}),
            "0 USD or above",
        ),
        (EvaluationConfig(measures=MeasuresConfig(tool_discipline="reward:")), "name the reward"),
        (
            EvaluationConfig(measures=MeasuresConfig(tool_discipline="x")),
            "`spans` or `reward:NAME`",
        ),
    ],
)
def test_settings_out_of_range(config: EvaluationConfig, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_evaluation(config)
