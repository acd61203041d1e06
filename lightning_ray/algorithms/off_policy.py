"""Weights for tokens that another policy sampled than the one that learns.

An older version may have sampled them, and an engine computes a little differently than a learner.
With rho_t = exp(logprob_t - recorded_logprob_t), the learner's probability over the engine's, and
P = product of rho_t over the sampled tokens of a sequence:

    token_truncate      min(rho_t, high)
    token_mask          rho_t where rho_t <= high, else 0
    icepop              rho_t where low <= rho_t <= high, else 0
    sequence_truncate   min(P, high)
    sequence_mask       P where P <= high, else 0

Truncation: Espeholt et al., 2018 (IMPALA, arXiv:1802.01561, section 4.1), for engines Yao et al.,
2025 ("Your efficient RL framework secretly brings you off-policy RL training"). Sequences and
masks: Liu et al., 2025 ("When speed kills stability"). IcePop: Ling team, 2025 (arXiv:2510.18855).
"""

import torch
from torch import Tensor

from lightning_ray.algorithms import segments
from lightning_ray.algorithms.config import CorrectionConfig


@torch.no_grad()
def correction(
    log_ratio: Tensor, sequence: Tensor, config: CorrectionConfig, mask_only: bool
) -> Tensor:
    """What each token's loss is multiplied by.

    Args:
        log_ratio: float32[N], log rho.
        sequence: int64[N], see `segments`.
        config: names one of the formulas of this module.
        mask_only: 1 in place of a weight that is not 0, for losses that have the ratio in them.

    Returns:
        float32[N], at least 0; without gradient.
    """
    if config.kind == "none":
        return torch.ones_like(log_ratio)
    whole = config.kind.startswith("sequence_")
    log_weight = segments.sums(log_ratio, sequence) if whole else log_ratio
    # Compared as logarithms: a product over a long sequence may be more than a float holds.
    if config.kind.endswith("_truncate"):
        return log_weight.clamp(max=_log(config.high)).exp()
    kept = log_weight <= _log(config.high)
    if config.kind == "icepop":
        kept &= log_weight >= _log(config.low)
    weight = torch.ones_like(log_weight) if mask_only else log_weight.exp()
    return torch.where(kept, weight, torch.zeros_like(weight))


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())
