"""Policy losses as pure functions of tensors, one entry per token to learn from.

Invariant: a loss is a weighted sum over tokens, and the weights carry the aggregation. So the loss
of a batch is the plain sum of the losses of its parts, however it is split over rows, micro-batches
and ranks; nothing is averaged twice. Metrics are sums (or maxima) for the same reason.
"""

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of PPO (Schulman et al., 2017, arXiv:1707.06347, equation 7), negated.

        L = - sum_n w_n min(rho_n A_n, clip(rho_n, 1 - epsilon_low, 1 + epsilon_high) A_n)
        rho_n = exp(logprobs_n - old_logprobs_n)

    Args:
        logprobs: float[N], natural logarithms under the policy that is trained; with gradient.
        old_logprobs: float[N], under the policy that sampled the tokens, as the engine gave them.
        advantages: float[N].
        weights: float[N], not negative; see the module's invariant.
        epsilon_low: how far below 1 the ratio still counts.
        epsilon_high: how far above 1.

    Returns:
        The loss, a float32 scalar, and metrics without gradient: `clipped` (number of tokens whose
        gradient the clip removed), `ratio_sum`, `ratio_max`, `difference_sum` and
        `abs_difference_sum` (of new minus old logprob). N may be 0: then all are zero.
    """
    logprobs = logprobs.float()
    advantages = advantages.float()
    difference = logprobs - old_logprobs.float()
    ratio = difference.exp()
    clipped_ratio = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    plain, clipped = ratio * advantages, clipped_ratio * advantages
    loss = -(weights.float() * torch.minimum(plain, clipped)).sum()
    with torch.no_grad():
        metrics = {
            "clipped": (clipped < plain).sum().float(),
            "ratio_sum": ratio.sum(),
            "ratio_max": ratio.max() if ratio.numel() else ratio.new_zeros(()),
            "difference_sum": difference.sum(),
            "abs_difference_sum": difference.abs().sum(),
        }
    return loss, metrics
