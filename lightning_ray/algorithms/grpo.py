"""GRPO: an attempt is as good as it did better than the other attempts at the same task.

    A_i = (r_i - mean(r)) / (std(r) + epsilon)

with the population standard deviation of the group. Credit: DeepSeekMath (Shao et al., 2024,
arXiv:2402.03300), section 4.1.2, outcome supervision: every token of an attempt gets the attempt's
advantage. Loss: the clipped ratio of their equation 3, without its KL term, so no reference model.
`normalize_by_std=False` leaves out the division (Dr. GRPO, Liu et al., 2025, arXiv:2503.20783),
which otherwise gives tasks that are nearly always or nearly never solved the larger weight.
"""

import numpy as np

from lightning_ray.algorithms.base import (
    AlgorithmConfig,
    FloatArray,
    Group,
    LossConfig,
    has_contrast,
)
from lightning_ray.errors import UserError


class GRPO:
    """Group-relative advantages; see the module for the formula."""

    def __init__(self, config: AlgorithmConfig) -> None:
        """Raises UserError for a loss that cannot use credit below zero."""
        if config.loss.kind != "clipped":
            raise UserError(
                f"algorithm.loss.kind={config.loss.kind}: grpo gives credit below zero; use clipped"
            )
        self.loss: LossConfig = config.loss
        self._normalize_by_std = config.normalize_by_std
        self._std_epsilon = config.std_epsilon

    def score_group(self, group: Group) -> FloatArray:
        """One advantage per attempt; exactly zero for a group without contrast."""
        if not has_contrast(group):
            # Rounding of the mean must not be blown up by a standard deviation of nearly zero.
            return np.zeros(len(group.rewards))
        advantages = group.rewards - group.rewards.mean()
        if self._normalize_by_std:
            advantages = advantages / (group.rewards.std() + self._std_epsilon)
        return advantages
