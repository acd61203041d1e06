"""Which groups have contrast: for dynamic sampling, which tries other tasks in place of the rest.

DAPO (Yu et al., 2025, arXiv:2503.14476, section 3.2).
"""

from collections.abc import Sequence

from lightning_ray.rollouts import RolloutRecord
from lightning_ray.training.rolling import came_to_reward


def has_contrast(records: Sequence[RolloutRecord]) -> bool:
    """Whether the attempts of a group came to different rewards."""
    return (
        len(
            {
                record.outcome.rewards["reward"]
                for record in records
                if came_to_reward(record) and record.outcome is not None
            }
        )
        > 1
    )
