"""Algorithms: from the rewards of a group of attempts to credit, and the loss credit is used in.

Owns credit assignment, one small file per algorithm, and the losses as pure functions of tensors.
It must not know Ray, HTTP, DeepSpeed, or where attempts and tokens come from. Choosing and checking
an algorithm imports no torch; only `losses` does.
"""

from lightning_ray.algorithms.base import (
    ALGORITHMS,
    Algorithm,
    AlgorithmConfig,
    Group,
    LossConfig,
    OwnLossAlgorithm,
    TokenLoss,
    check_algorithm,
    has_contrast,
    make_algorithm,
    own_loss,
    score,
    token_weights,
)

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmConfig",
    "Group",
    "LossConfig",
    "OwnLossAlgorithm",
    "TokenLoss",
    "check_algorithm",
    "has_contrast",
    "make_algorithm",
    "own_loss",
    "score",
    "token_weights",
]
