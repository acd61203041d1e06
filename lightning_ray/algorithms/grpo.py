"""GRPO: an attempt is as good as it did better than the other attempts at the same task.

    A_i = (r_i - mean(r)) / (std(r) + epsilon)

with the population standard deviation of the group. Credit: DeepSeekMath (Shao et al., 2024,
arXiv:2402.03300), section 4.1.2, outcome supervision: every token of an attempt gets the attempt's
advantage. Loss: the clipped ratio of their equation 3; its KL term is `loss.kl`, off by default.
"""

from lightning_ray.algorithms.credit import GroupRelative


class GRPO(GroupRelative):
    """Group-relative advantages; see the module for the formula."""
