"""The settings of the `evaluation` configuration group."""

from dataclasses import dataclass

from lightning_ray.errors import UserError


@dataclass
class EvaluationConfig:
    """How a version is scored on tasks that are in no training step."""

    tasks: str | None = None
    """JSONL file of held-out tasks; null measures nothing before and after."""
    samples_per_task: int = 1
    """Rollouts per held-out task."""


def check_evaluation(config: EvaluationConfig) -> None:
    """Raises UserError for values outside their range."""
    if config.samples_per_task < 1:
        raise UserError(
            f"evaluation.samples_per_task={config.samples_per_task}: must be at least 1"
        )
