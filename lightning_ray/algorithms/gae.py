"""Advantages from values: how much better a token turned out than was expected before it.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t = sum_l (gamma lambda)^l delta_{t+l}

over the sampled tokens of a sequence, V = 0 after the last. Generalised advantage estimation
(Schulman et al., 2015, arXiv:1506.02438, equation 16).
"""

import torch
from torch import Tensor


@torch.no_grad()
def advantages(
    values: Tensor, rewards: Tensor, sequence: Tensor, discount: float, trace: float
) -> Tensor:
    """The advantage of each token; with the value it is what the value should have been.

    Args:
        values: float32[N], V before each token.
        rewards: float32[N], r at each token.
        sequence: int64[N], see `segments`.
        discount: gamma.
        trace: lambda.

    Returns:
        float32[N].
    """
    # Token by token, on the processor: a batch has thousands of them, and each needs the next.
    value, reward, number = (one.tolist() for one in (values.float(), rewards.float(), sequence))
    found = [0.0] * len(value)
    for place in range(len(value) - 1, -1, -1):
        goes_on = place + 1 < len(value) and number[place + 1] == number[place]
        following = value[place + 1] if goes_on else 0.0
        later = found[place + 1] if goes_on else 0.0
        found[place] = (
            reward[place] + discount * following - value[place] + discount * trace * later
        )
    return torch.tensor(found, dtype=torch.float32, device=values.device)


@torch.no_grad()
def at_the_end(credit: Tensor, sequence: Tensor) -> Tensor:
    """The credit of a sequence as a reward at its last token; 0 at the others. float32[N] each."""
    last = torch.ones_like(sequence, dtype=torch.bool)
    if len(sequence):
        last[:-1] = sequence[1:] != sequence[:-1]
    return torch.where(last, credit.float(), torch.zeros_like(credit, dtype=torch.float32))
