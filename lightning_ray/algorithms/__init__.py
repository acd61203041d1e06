"""Algorithms: from the rewards of a group of attempts to credit, and the loss credit is used in.

Owns credit assignment, one small file per algorithm, and the losses as pure functions of tensors.
It must not know Ray, HTTP, DeepSpeed, or where attempts and tokens come from. Choosing and checking
an algorithm imports no torch; only `losses` does.
"""

from lightning_ray.algorithms.base import (
    ALGORITHMS,
    Algorithm,
    BatchAlgorithm,
    Group,
    OwnLossAlgorithm,
    TokenLoss,
    check_algorithm,
    finish,
    has_contrast,
    make_algorithm,
    own_loss,
    score,
)
from lightning_ray.algorithms.config import AlgorithmConfig, LossConfig, check_loss
from lightning_ray.algorithms.credit import overlong
from lightning_ray.algorithms.weights import token_weights

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmConfig",
    "BatchAlgorithm",
    "Group",
    "LossConfig",
    "OwnLossAlgorithm",
    "TokenLoss",
    "check_algorithm",
    "check_loss",
    "finish",
    "has_contrast",
    "make_algorithm",
    "overlong",
    "own_loss",
    "score",
    "token_weights",
]
