"""REINFORCE++: no critic, and advantages that are normalised over the batch, not over a group.

    A = (r - mean over the batch) / (std over the batch + epsilon)

One attempt at a task is enough (`group_size=1`); where there are several, a group in which all did
equally well still teaches, compared with the other tasks. The KL term lies in the reward, k1 at
each token (`loss.kl`). Hu et al., 2025 (arXiv:2501.03262).

With a baseline the mean of the group is taken away first, and the batch's deviation divides; that
one needs contrast within a group, and has its KL term in the loss, k2.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_ray.algorithms.base import FloatArray
from lightning_ray.algorithms.credit import GroupRelative


class ReinforcePP(GroupRelative):
    """See the module for the formula."""

    name = "reinforce_pp"
    losses = ("clipped", "policy_gradient")
    needs: ClassVar[Mapping[str, Any]] = {"normalize": "batch"}
    needs_contrast = False
    fewest = 1

    def advantages(self, rewards: FloatArray) -> FloatArray:
        """The rewards themselves."""
        return rewards


class ReinforcePPBaseline(GroupRelative):
    """REINFORCE++ with the group's mean as a baseline; see the module for the formula."""

    name = "reinforce_pp_baseline"
    losses = ("clipped", "policy_gradient")
    needs: ClassVar[Mapping[str, Any]] = {"normalize": "batch"}
