"""REINFORCE++: no critic, and advantages that are normalised over the batch, not over a group.

    A = (r - mean over the batch) / (std over the batch + epsilon)

One attempt at a task is enough (`group_size=1`); where there are several, a group in which all did
equally well still teaches, compared with the other tasks. The KL term lies in the reward, k1 at
each token (`loss.kl`), and is taken away before the batch is normalised. Hu et al., 2025
(arXiv:2501.03262).

With a baseline the mean of the group is taken away first, and the batch's deviation divides; that
one needs contrast within a group, and has its KL term in the loss, k2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_ray.algorithms.base import FloatArray, Group
from lightning_ray.algorithms.config import AlgorithmConfig
from lightning_ray.algorithms.credit import GroupRelative


class ReinforcePP(GroupRelative):
    """See the module for the formula."""

    name = "reinforce_pp"
    losses = ("clipped", "policy_gradient")
    needs: ClassVar[Mapping[str, Any]] = {
        "normalize": "batch",
        "loss.kl.place": "reward",
        "loss.kl.whiten": True,
    }
    needs_contrast = False
    fewest = 1

    def __init__(self, config: AlgorithmConfig) -> None:
        """Raises UserError for settings that make another algorithm of it."""
        super().__init__(config)
        # What is normalised is the reward less the KL term, which the learner alone knows.
        self.zero_teaches = config.loss.kl.in_reward

    def advantages(self, rewards: FloatArray) -> FloatArray:
        """The rewards themselves."""
        return rewards

    def finish_batch(
        self, groups: Sequence[Group], credits: Sequence[FloatArray]
    ) -> list[FloatArray]:
        """Normalised over the batch, here or by the learner."""
        return list(credits) if self.zero_teaches else super().finish_batch(groups, credits)


class ReinforcePPBaseline(GroupRelative):
    """REINFORCE++ with the group's mean as a baseline; see the module for the formula."""

    name = "reinforce_pp_baseline"
    losses = ("clipped", "policy_gradient")
    needs: ClassVar[Mapping[str, Any]] = {"normalize": "batch"}
