"""RLOO: REINFORCE, with the mean of the other attempts as the baseline of each.

    A_i = r_i - 1/(G - 1) sum_{j != i} r_j

The baseline does not depend on the attempt itself, so the gradient stays unbiased; the sum over an
attempt's tokens is divided by a constant. Ahmadian et al., 2024 (arXiv:2402.14740), section 2.2.
Loss: `policy_gradient`, or `clipped`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_ray.algorithms.base import FloatArray
from lightning_ray.algorithms.credit import GroupRelative, leave_one_out


class RLOO(GroupRelative):
    """See the module for the formula."""

    name = "rloo"
    losses = ("policy_gradient", "clipped")
    needs: ClassVar[Mapping[str, Any]] = {
        "normalize": "none",
        "loss.aggregation": "fixed_length",
    }

    def advantages(self, rewards: FloatArray) -> FloatArray:
        """Before they are normalised."""
        return leave_one_out(rewards)
