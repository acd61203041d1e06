"""The losses as pure functions of tensors, one entry per token to learn from.

Invariant: a loss is a weighted sum over tokens, and the weights carry the aggregation. So the loss
of a batch is the plain sum of the losses of its parts, however it is split over rows, micro-batches
and ranks; nothing is averaged twice. Metrics are sums (or maxima) for the same reason.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ray.algorithms.base import LossConfig, TokenLoss

PartLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs, old_logprobs, advantages, weights) of a part of a batch -> its loss and metrics; see
`clipped_policy_loss` for both."""


def choose_loss(config: LossConfig, own: TokenLoss | None, total_weight: float) -> PartLoss:
    """The loss that an algorithm uses, as a function of the parts of a batch.

    Args:
        config: names the loss where `own` is None.
        own: the algorithm's own.
        total_weight: sum of weights times advantages over the whole batch; what cross_entropy is
            divided by.
    """

    def clipped(
        logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return clipped_policy_loss(
            logprobs, old, advantages, weights, config.epsilon_low, config.epsilon_high
        )

    def cross_entropy(
        logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = cross_entropy_loss(logprobs, weights.float() * advantages.float(), total_weight)
        return loss, difference_metrics(logprobs, old)

    def own_tokens(
        logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert own is not None
        losses = own(logprobs.float(), old.float(), advantages.float())
        return (weights.float() * losses).sum(), difference_metrics(logprobs, old)

    if own is not None:
        return own_tokens
    return {"clipped": clipped, "cross_entropy": cross_entropy}[config.kind]


def cross_entropy_loss(logprobs: Tensor, weights: Tensor, total_weight: float) -> Tensor:
    """The cross-entropy of the tokens as they were sampled, a weighted mean.

        L = - sum_n w_n logprobs_n / sum w

    Args:
        logprobs: float[N], natural logarithms under the policy that is trained; with gradient.
        weights: float[N], w; not negative.
        total_weight: the sum of w over the whole batch, of which these N tokens may be a part:
            the loss of the batch is then the plain sum over its parts. Greater than 0.

    Returns:
        A float32 scalar, in nats per token.
    """
    return -(weights.float() * logprobs.float()).sum() / total_weight


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
        metrics = difference_metrics(logprobs, old_logprobs)
        metrics["clipped"] = (clipped < plain).sum().float()
    return loss, metrics


@torch.no_grad()
def difference_metrics(logprobs: Tensor, old_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled; see `clipped_policy_loss`."""
    difference = logprobs.float() - old_logprobs.float()
    ratio = difference.exp()
    return {
        "clipped": ratio.new_zeros(()),
        "ratio_sum": ratio.sum(),
        "ratio_max": ratio.max() if ratio.numel() else ratio.new_zeros(()),
        "difference_sum": difference.sum(),
        "abs_difference_sum": difference.abs().sum(),
    }
