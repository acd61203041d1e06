"""Dr. GRPO: GRPO without what makes its gradient a biased one.

    A_i = r_i - mean(r)

and the sum over an answer's tokens is divided by a constant, not by the answer's own length. GRPO's
standard deviation gives tasks that are nearly always or nearly never solved the larger weight, its
lengths make long wrong answers cheap. Liu et al., 2025 (arXiv:2503.20783), section 3.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_ray.algorithms.credit import GroupRelative


class DrGRPO(GroupRelative):
    """See the module for the formula."""

    name = "dr_grpo"
    needs: ClassVar[Mapping[str, Any]] = {"normalize": "none", "loss.aggregation": "fixed_length"}
