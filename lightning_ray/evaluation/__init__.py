"""The operator's measures: how good a policy is, how sure that is, and the report that says so.

Owns the statistics, the gates and the report. It is handed rewards or a table of spans; it does not
know how they came about, and imports nothing of the learning side.

Invariant: an infrastructure fault is not a zero. It is left out of every mean, and counted.
"""

from lightning_ray.evaluation.config import EvaluationConfig, check_evaluation
from lightning_ray.evaluation.difference import (
    Difference,
    TaskScores,
    heldout_scores,
    paired,
    unpaired,
)
from lightning_ray.evaluation.evaluation import Evaluation, Side, evaluate, write_evaluation
from lightning_ray.evaluation.gates import GateConfig, check_gate
from lightning_ray.evaluation.measures import Interval, completion_quality, paired_difference
from lightning_ray.evaluation.outcomes import Outcome, read_outcomes
from lightning_ray.evaluation.report import HeldoutReport, write_report

__all__ = [
    "Difference",
    "Evaluation",
    "EvaluationConfig",
    "GateConfig",
    "HeldoutReport",
    "Interval",
    "Outcome",
    "Side",
    "TaskScores",
    "check_evaluation",
    "check_gate",
    "completion_quality",
    "evaluate",
    "heldout_scores",
    "paired",
    "paired_difference",
    "read_outcomes",
    "unpaired",
    "write_evaluation",
    "write_report",
]
