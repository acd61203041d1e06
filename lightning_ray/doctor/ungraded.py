"""The grader of an agent that has none yet: its numbers are written down and never shown."""

from typing import Any

SPEC = "lightning_ray.doctor.ungraded:grade"


def grade(task: dict[str, Any], result: Any, spans: Any) -> float:
    """Zero, which no finding is made of."""
    return 0.0
