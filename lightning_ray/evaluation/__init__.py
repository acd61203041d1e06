"""The operator's measures: how good a policy is, how sure that is, and the report that says so.

Owns the statistics and the report. It is handed rewards; it does not know how they came about, and
imports nothing of the learning side.

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
from lightning_ray.evaluation.measures import Interval, completion_quality, paired_difference
from lightning_ray.evaluation.report import HeldoutReport, write_report

__all__ = [
    "Difference",
    "EvaluationConfig",
    "HeldoutReport",
    "Interval",
    "TaskScores",
    "check_evaluation",
    "completion_quality",
    "heldout_scores",
    "paired",
    "paired_difference",
    "unpaired",
    "write_report",
]
