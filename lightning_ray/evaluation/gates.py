"""Gates: what a version must reach, for a pipeline that asks yes or no.

Invariant: a gate that is set and cannot be measured is not met.
"""

from dataclasses import asdict, dataclass

from lightning_ray.errors import UserError
from lightning_ray.evaluation.comparison import Comparison
from lightning_ray.evaluation.measures import Interval
from lightning_ray.evaluation.scorecard import Scorecard


@dataclass
class GateConfig:
    """Limits; null sets none."""

    min_completion: float | None = None
    """Completion quality, at least."""
    max_regression: float | None = None
    """Reward by which the version may be worse than `against` on the mean task, at most."""
    min_tool_discipline: float | None = None
    """Share of tool calls, at least."""
    max_rollback_frequency: float | None = None
    """Share of rollouts, at most."""
    max_override_rate: float | None = None
    """Share of reviewed rollouts, at most."""
    max_cost_per_resolved: float | None = None
    """USD, at most."""
    max_failed: float | None = None
    """Share of rollouts that came to no outcome, at most."""
    confident: bool = False
    """Ask it of the worse end of the 95 % interval, not of the value."""


@dataclass(frozen=True)
class GateResult:
    """Whether one limit is met."""

    name: str
    limit: float
    value: float | None
    """What was asked; None where it cannot be measured."""
    passed: bool
    reason: str
    """Why not, in words; empty for one that is met."""


_SHARES = (
    "min_tool_discipline",
    "max_rollback_frequency",
    "max_override_rate",
    "max_failed",
)
_MEASURES = {
    "min_completion": "completion_quality",
    "min_tool_discipline": "tool_discipline",
    "max_rollback_frequency": "rollback_frequency",
    "max_override_rate": "override_rate",
    "max_cost_per_resolved": "cost_per_resolved",
}


def check_gate(config: GateConfig, against: bool) -> None:
    """Raises UserError for limits that nothing could meet, or that lack what to compare with."""
    for name in _SHARES:
        limit = getattr(config, name)
        if limit is not None and not 0 <= limit <= 1:
            raise UserError(f"gate.{name}={limit}: a share lies between 0 and 1")
    for name in ("max_regression", "max_cost_per_resolved"):
        limit = getattr(config, name)
        if limit is not None and limit < 0:
            raise UserError(f"gate.{name}={limit}: must be 0 or above")
    if config.max_regression is not None and not against:
        raise UserError(
            f"gate.max_regression={config.max_regression}: regression against what? add against=..."
        )


def check_gates(
    config: GateConfig, card: Scorecard, comparison: Comparison | None
) -> tuple[GateResult, ...]:
    """The results of the limits that are set."""
    results = []
    for name, limit in asdict(config).items():
        if limit is None or name == "confident":
            continue
        if name == "max_failed":
            failed = card.failed / card.rollouts if card.rollouts else 1.0
            found: Interval | str = Interval(failed, failed, failed, card.rollouts)
            what = "failed rollouts"
        elif name == "max_regression":
            found = comparison.difference if comparison else "no task is in both sets"
            what = "mean difference"
        else:
            measure = card.measure(_MEASURES[name])
            found = measure.interval or measure.missing
            what = measure.title
        results.append(_result(name, limit, what, found, config.confident))
    return tuple(results)


def _result(
    name: str, limit: float, what: str, found: Interval | str, confident: bool
) -> GateResult:
    if isinstance(found, str):
        return GateResult(name, limit, None, False, f"{what} not measurable: {found}")
    # A regression is a difference below 0: its worse end is the lower one, as of what must be high.
    high_is_good = name.startswith("min_") or name == "max_regression"
    value = found.mean
    if confident:
        value = found.low if high_is_good else found.high
    bound = -limit if name == "max_regression" else limit
    # A limit that is met to the last digit is met, whatever rounding did.
    beyond = bound - value if high_is_good else value - bound
    if beyond <= 1e-9:
        return GateResult(name, limit, value, True, "")
    end = " at the worse end of its interval" if confident else ""
    return GateResult(name, limit, value, False, f"{what} {value:.4g}{end} (n {found.n})")
