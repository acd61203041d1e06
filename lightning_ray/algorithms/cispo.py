"""CISPO: GRPO's credit, and a ratio that is clipped without taking a token's gradient away.

`surrogates.clipped_weight`; there is no lower bound, which `loss.epsilon_low=1` says. MiniMax, 2025
(MiniMax-M1, arXiv:2506.13585), section 3.1.
"""

from lightning_ray.algorithms.credit import GroupRelative


class CISPO(GroupRelative):
    """See the module for what it is made of."""

    name = "cispo"
    losses = ("clipped_weight",)
