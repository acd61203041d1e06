"""GSPO: GRPO's credit, and one probability ratio for a whole sequence.

The ratio is the geometric mean of the tokens' (`surrogates.sequence_clipped`), so its bounds are
much narrower than those of a token. Zheng et al., 2025 (arXiv:2507.18071).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_ray.algorithms.credit import GroupRelative


class GSPO(GroupRelative):
    """See the module for what it is made of."""

    name = "gspo"
    losses = ("sequence_clipped",)
    needs: ClassVar[Mapping[str, Any]] = {"loss.aggregation": "sequence_mean"}
