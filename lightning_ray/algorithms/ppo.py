"""PPO: a critic says what to expect, and a token is as good as it turned out better.

The credit of an attempt is its reward; advantages are estimated token by token from the critic's
values (`gae`), in the learner. No other attempt is compared with, so one at a task is enough, and
an attempt that is worth nothing teaches the critic. Schulman et al., 2017 (arXiv:1707.06347).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_ray.algorithms.base import FloatArray
from lightning_ray.algorithms.config import AlgorithmConfig
from lightning_ray.algorithms.credit import GroupRelative
from lightning_ray.errors import UserError


class PPO(GroupRelative):
    """See the module for what it is made of."""

    name = "ppo"
    losses = ("clipped",)
    needs: ClassVar[Mapping[str, Any]] = {"normalize": "none"}
    needs_contrast = False
    zero_teaches = True
    fewest = 1

    def __init__(self, config: AlgorithmConfig) -> None:
        """Raises UserError for settings that make another algorithm of it."""
        super().__init__(config)
        if not config.loss.critic.coefficient:
            raise UserError(
                "algorithm.loss.critic.coefficient=0: ppo needs a critic; algorithm=ppo sets it"
            )

    def advantages(self, rewards: FloatArray) -> FloatArray:
        """The rewards themselves."""
        return rewards
