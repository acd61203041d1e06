"""Gates: each limit is asked of its measure, and what cannot be measured is not met."""

from typing import Any

import pytest
from evaluation_support import attempt, table

from lightning_ray.errors import UserError
from lightning_ray.evaluation import (
    Evaluation,
    EvaluationConfig,
    GateConfig,
    Side,
    check_gate,
    evaluate,
    read_outcomes,
)


def evaluated(gate: GateConfig, ours: list[float], theirs: list[float] | None = None) -> Evaluation:
    def side(label: str, values: list[float]) -> Side:
        rows: list[dict[str, Any]] = []
        for number, value in enumerate(values):
            rows += attempt(f"{number}/1", f"t{number}", {"reward": value})
        return Side(label, read_outcomes(table(rows)))

    against = None if theirs is None else side("against", theirs)
    return evaluate(side("ours", ours), against, EvaluationConfig(), gate)


@pytest.mark.parametrize(("limit", "met"), [(0.75, True), (0.7500001, False), (0.0, True)])
def test_completion_is_asked_for_at_least(limit: float, met: bool) -> None:
    found = evaluated(GateConfig(min_completion=limit), [1.0, 1.0, 1.0, 0.0])
    (gate,) = found.gates
    assert (gate.value, gate.passed, bool(found.failed_gates)) == (0.75, met, not met)


def test_a_confident_gate_asks_the_worse_end() -> None:
    found = evaluated(GateConfig(min_completion=0.7, confident=True), [1.0, 1.0, 1.0, 0.0])
    (gate,) = found.gates
    assert not gate.passed and gate.value is not None and gate.value < 0.7
    assert "worse end of its interval" in gate.reason


@pytest.mark.parametrize(("limit", "met"), [(0.02, False), (0.1, True), (0.2, True)])
def test_regression_is_the_mean_difference_of_pairs(limit: float, met: bool) -> None:
    # 0.1 worse on the mean of four tasks; 0.1 itself is met in spite of rounding.
    found = evaluated(GateConfig(max_regression=limit), [0.3, 0.5, 0.1, 0.7], [0.4, 0.6, 0.2, 0.8])
    (gate,) = found.gates
    assert gate.value == pytest.approx(-0.1) and gate.passed is met


def test_getting_better_is_no_regression() -> None:
    assert not evaluated(GateConfig(max_regression=0.0), [1.0, 0.0], [0.0, 0.0]).failed_gates


def test_what_cannot_be_measured_is_not_met() -> None:
    limits = GateConfig(max_override_rate=1.0, min_tool_discipline=0.0, max_cost_per_resolved=9.0)
    found = evaluated(limits, [1.0])
    assert [gate.value for gate in found.failed_gates] == [None] * 3
    assert all("not measurable" in gate.reason for gate in found.failed_gates)


def test_failed_rollouts_are_gated_as_a_share() -> None:
    rows = attempt("a/1", "t", {"reward": 1.0}) + attempt("b/1", "t", status="timed_out")
    side = Side("ours", read_outcomes(table(rows)))
    for limit, met in ((0.5, True), (0.4, False)):
        (gate,) = evaluate(side, None, EvaluationConfig(), GateConfig(max_failed=limit)).gates
        assert (gate.value, gate.passed) == (0.5, met)


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (GateConfig(max_regression=0.1), "add against="),
        (GateConfig(max_override_rate=1.5), "between 0 and 1"),
        (GateConfig(max_cost_per_resolved=-1.0), "0 or above"),
    ],
)
def test_limits_that_make_no_sense(gate: GateConfig, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_gate(gate, against=False)
