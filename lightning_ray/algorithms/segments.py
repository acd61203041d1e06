"""Sums over the tokens of each sequence of a part; tokens of one sequence stand together, in order.

Invariant: a sequence is whole in its part, however a batch is split (`learner.packing`).
"""

import torch
from torch import Tensor


def sums(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum of `values` over its sequence.

    Args:
        values: float[N].
        sequence: int64[N], from 0, never falling.
    """
    return _totals(values, sequence)[sequence]


def means(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the mean of `values` over its sequence; arguments as `sums`."""
    return sums(values, sequence) / sums(torch.ones_like(values), sequence)


def to_go(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum of `values` over it and what follows in its sequence; as `sums`."""
    # In double, because the sums before a sequence cancel.
    wide = values.double()
    totals = _totals(wide, sequence)
    before = totals.cumsum(0) - totals
    passed = wide.cumsum(0) - wide - before[sequence]
    return (totals[sequence] - passed).to(values.dtype)


def _totals(values: Tensor, sequence: Tensor) -> Tensor:
    count = int(sequence[-1]) + 1 if len(sequence) else 0
    return values.new_zeros(count).index_add_(0, sequence, values)
