"""DAPO: GRPO's credit with four changes for long answers. Yu et al., 2025 (arXiv:2503.14476).

Clip-higher: `loss.epsilon_high` above `loss.epsilon_low`, so that unlikely tokens can become likely
(section 3.1). Dynamic sampling: `extra_rounds`, other tasks in place of groups without contrast
(3.2). Token-level loss: `loss.aggregation=token_mean` (3.3). Overlong shaping: `overlong` (3.4).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_ray.algorithms.config import AlgorithmConfig
from lightning_ray.algorithms.credit import GroupRelative
from lightning_ray.errors import UserError


class DAPO(GroupRelative):
    """See the module for what it is made of."""

    name = "dapo"
    needs: ClassVar[Mapping[str, Any]] = {"loss.aggregation": "token_mean"}

    def __init__(self, config: AlgorithmConfig) -> None:
        """Raises UserError for settings that make another algorithm of it."""
        super().__init__(config)
        if config.loss.epsilon_high <= config.loss.epsilon_low:
            raise UserError(
                f"algorithm.loss.epsilon_high={config.loss.epsilon_high}: dapo needs more than "
                f"epsilon_low={config.loss.epsilon_low}; algorithm=dapo sets it"
            )
