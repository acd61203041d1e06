"""The surrogate losses, token by token: what falls when credited tokens become more likely.

Each takes logprobs (float32[N], with gradient), old logprobs (float32[N], without), advantages
(float32[N]), the sequence of each token (int64[N], see `segments`) and the configuration, and gives
the loss of each token and whether the clip acted on it, bool[N]. With

    rho_n = exp(logprob_n - old_logprob_n),  low = 1 - epsilon_low,  high = 1 + epsilon_high

and sg(x) for x without its gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ray.algorithms import segments
from lightning_ray.algorithms.config import LossConfig

Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor, LossConfig], tuple[Tensor, Tensor]]


def clipped(
    logprobs: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """- min(rho_n A_n, clip(rho_n, low, high) A_n)

    PPO (Schulman et al., 2017, arXiv:1707.06347, equation 7); with two bounds DAPO (Yu et al.,
    2025, arXiv:2503.14476, equation 10).
    """
    return _pessimistic((logprobs - old).exp(), advantages, config)


def sequence_clipped(
    logprobs: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """As `clipped`, with s_n in place of rho_n: one ratio for the whole sequence.

        s_n = sg(s) exp(logprob_n - sg(logprob_n)),  s = exp(mean of log rho over the sequence)

    GSPO (Zheng et al., 2025, arXiv:2507.18071, equations 7 and 14). Under sequence_mean, with one
    credit and one sequence an attempt, value and gradient are those of its equation 5.
    """
    mean = segments.means((logprobs - old).detach(), sequence)
    return _pessimistic((mean + logprobs - logprobs.detach()).exp(), advantages, config)


def clipped_weight(
    logprobs: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """- sg(clip(rho_n, low, high)) A_n logprob_n

    CISPO (MiniMax, 2025, arXiv:2506.13585, equations 4 and 5): no token loses its gradient.
    """
    ratio = (logprobs.detach() - old).exp()
    bounded = ratio.clamp(1.0 - config.epsilon_low, 1.0 + config.epsilon_high)
    return -bounded * advantages * logprobs, bounded != ratio


def policy_gradient(
    logprobs: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """- A_n logprob_n

    REINFORCE (Williams, 1992). What samples of other policies need is the correction's affair.
    """
    return -advantages * logprobs, torch.zeros_like(logprobs, dtype=torch.bool)


def _pessimistic(ratio: Tensor, advantages: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    bounded = ratio.clamp(1.0 - config.epsilon_low, 1.0 + config.epsilon_high)
    plain, clip = ratio * advantages, bounded * advantages
    return -torch.minimum(plain, clip), (clip < plain).detach()


SURROGATES: dict[str, Surrogate] = {
    "clipped": clipped,
    "sequence_clipped": sequence_clipped,
    "clipped_weight": clipped_weight,
    "policy_gradient": policy_gradient,
}
"""By `LossConfig.kind`."""
