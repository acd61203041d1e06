"""The losses as pure functions of tensors, one entry per token to learn from.

Invariant: a loss is a weighted sum over tokens, and the weights carry the aggregation. So the loss
of a batch is the plain sum of the losses of its parts, however it is split over rows, micro-batches
and ranks; nothing is averaged twice. Metrics are sums (or maxima) for the same reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ray.algorithms import divergence, gae, segments
from lightning_ray.algorithms.base import TokenLoss
from lightning_ray.algorithms.config import LossConfig
from lightning_ray.algorithms.off_policy import correction
from lightning_ray.algorithms.surrogates import SURROGATES

Metrics = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a batch's tokens, whole sequences of them; N may be 0."""

    logprobs: Tensor
    """float[N], natural logarithms under the policy that is trained; with gradient."""
    old_logprobs: Tensor
    """float[N], as the engine recorded them when it sampled the tokens."""
    advantages: Tensor
    """float[N]"""
    weights: Tensor
    """float[N], not negative; see the module's invariant."""
    sequence: Tensor
    """int64[N]: which sequence a token belongs to, see `segments`."""
    reference: Tensor | None = None
    """float[N], logprobs under the reference; needed where `kl.coefficient` is not 0."""
    entropy: Tensor | None = None
    """float[N], of the policy where it sampled, in nats; with gradient. Needed where
    `entropy_coefficient` is not 0."""
    values: Tensor | None = None
    """float[N], what the critic expects before each token; with gradient. Needed where
    `critic.coefficient` is not 0."""
    whitening: tuple[float, float] = (0.0, 1.0)
    """Mean and deviation over the whole batch that advantages are brought from (`whitens`)."""


PartLoss = Callable[[Part], tuple[Tensor, Metrics]]
"""A part of a batch to its loss, a float32 scalar, and metrics without gradient: `clipped` (tokens
whose gradient the clip removed or bounded), `masked` (tokens that the correction left out),
`divergence_sum` (from the reference), `value_error_sum` (squared, of the critic), `ratio_sum`,
`ratio_max`, `difference_sum` and `abs_difference_sum` (of new minus recorded logprob)."""


def choose_loss(config: LossConfig, own: TokenLoss | None, total_weight: float) -> PartLoss:
    """The loss that an algorithm uses, as a function of the parts of a batch.

    Args:
        config: names the loss where `own` is None.
        own: the algorithm's own.
        total_weight: sum of weights times advantages over the whole batch; what cross_entropy is
            divided by.
    """

    def policy(part: Part) -> tuple[Tensor, Metrics]:
        return policy_loss(part, config)

    def cross_entropy(part: Part) -> tuple[Tensor, Metrics]:
        credit = part.weights.float() * part.advantages.float()
        loss = cross_entropy_loss(part.logprobs, credit, total_weight)
        loss = loss - _entropy_bonus(part, config)
        return loss, difference_metrics(part.logprobs, part.old_logprobs)

    def own_tokens(part: Part) -> tuple[Tensor, Metrics]:
        assert own is not None
        losses = own(part.logprobs.float(), part.old_logprobs.float(), part.advantages.float())
        metrics = difference_metrics(part.logprobs, part.old_logprobs)
        return (part.weights.float() * losses).sum(), metrics

    if own is not None:
        return own_tokens
    return cross_entropy if config.kind == "cross_entropy" else policy


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


def policy_loss(part: Part, config: LossConfig) -> tuple[Tensor, Metrics]:
    """A surrogate of the policy's return, with what is orthogonal to it.

        L = sum_n w_n (c_n S_n + beta k_n + nu (V_n - G_n)^2 / 2) - alpha sum_n w_n H_n

    with S_n the token's surrogate loss (`surrogates`), c_n its correction (`off_policy`), k_n its
    divergence from the reference (`divergence`; here only where kl.place is loss) and H_n the
    policy's entropy. Where kl.place is reward, the credit of token n falls by the sum of
    beta k over it and what follows in its sequence, as if beta k were a cost of each token
    (Ziegler et al., 2019, arXiv:1909.08593, equation 2; per token as in Ouyang et al., 2022).

    With a critic (nu above 0) a sequence's credit is a reward at its last token, the costs beta k
    are rewards below 0 at theirs, advantages come from the values V (`gae`), and G_n = A_n + V_n.
    """
    logprobs, recorded = part.logprobs.float(), part.old_logprobs.float()
    weights = part.weights.float()
    now = logprobs.detach()
    metrics = difference_metrics(logprobs, recorded)
    old = now if config.old == "current" else recorded
    mask_only = config.old == "recorded" and config.kind != "policy_gradient"
    corrected = correction(now - recorded, part.sequence, config.correction, mask_only)
    kept = corrected > 0
    metrics["masked"] = (~kept).sum().float()
    # What is left out must not spoil the sum: its ratio may be more than a float holds.
    learnt = torch.where(kept, logprobs, old)
    beside = -_entropy_bonus(part, config)
    if config.kl.coefficient:
        reference = _given(part.reference, "reference").float()
        with torch.no_grad():
            metrics["divergence_sum"] = divergence.estimate(now, reference, "k3").sum()
        if config.kl.place == "loss":
            apart = divergence.estimate(logprobs, reference, config.kl.estimator)
            beside = beside + config.kl.coefficient * (weights * apart).sum()
    if config.critic.coefficient:
        values = _given(part.values, "value").float()
        estimated = token_advantages(part, config)
        error = (values - (estimated + values.detach())).square()
        beside = beside + 0.5 * config.critic.coefficient * (weights * error).sum()
        metrics["value_error_sum"] = error.detach().sum()
        advantages = estimated
    else:
        advantages = token_advantages(part, config)
    mean, deviation = part.whitening
    advantages = (advantages - mean) / deviation
    losses, clipped = SURROGATES[config.kind](learnt, old, advantages, part.sequence, config)
    metrics["clipped"] = clipped.sum().float()
    return (weights * corrected * losses).sum() + beside, metrics


def whitens(config: LossConfig) -> bool:
    """Whether advantages are brought to mean 0 and deviation 1 over the batch by the learner."""
    if config.critic.coefficient:
        return config.critic.whiten
    return config.kl.whiten and config.kl.in_reward


@torch.no_grad()
def token_advantages(part: Part, config: LossConfig) -> Tensor:
    """The credit of each token less what follows in costs, or from a critic's values.

    float32[N], not whitened, without gradient.
    """
    costs = _costs(part, config)
    if not config.critic.coefficient:
        credit = part.advantages.float()
        return credit if costs is None else credit - segments.to_go(costs, part.sequence)
    rewards = gae.at_the_end(part.advantages, part.sequence)
    if costs is not None:
        rewards = rewards - costs
    values = _given(part.values, "value")
    return gae.advantages(
        values, rewards, part.sequence, config.critic.discount, config.critic.trace
    )


@torch.no_grad()
def _costs(part: Part, config: LossConfig) -> Tensor | None:
    """What each token's divergence takes from its reward; None where it takes nothing."""
    if not config.kl.in_reward:
        return None
    reference = _given(part.reference, "reference").float()
    now = part.logprobs.detach().float()
    return config.kl.coefficient * divergence.estimate(now, reference, config.kl.estimator)


def _entropy_bonus(part: Part, config: LossConfig) -> Tensor:
    if not config.entropy_coefficient:
        return part.logprobs.new_zeros((), dtype=torch.float32)
    entropy = _given(part.entropy, "entropy").float()
    return config.entropy_coefficient * (part.weights.float() * entropy).sum()


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the loss needs the {name} of every token")
    return value


@torch.no_grad()
def difference_metrics(logprobs: Tensor, old_logprobs: Tensor) -> Metrics:
    """How far the policy is from the one that sampled; see `PartLoss`."""
    difference = logprobs.float() - old_logprobs.float()
    ratio = difference.exp()
    zero = ratio.new_zeros(())
    return {
        "clipped": zero,
        "masked": zero,
        "divergence_sum": zero,
        "value_error_sum": zero,
        "ratio_sum": ratio.sum(),
        "ratio_max": ratio.max() if ratio.numel() else zero,
        "difference_sum": difference.sum(),
        "abs_difference_sum": difference.abs().sum(),
    }
