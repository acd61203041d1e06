"""How the losses of tokens become the loss of a batch: one weight per token.

Invariant: the weights carry the aggregation, so that the loss of a batch is a plain sum over its
tokens, however they are split over rows, micro-batches and ranks.
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def token_weights(
    attempts: IntArray, aggregation: str, groups: IntArray | None = None, fixed_length: int = 0
) -> FloatArray:
    """The weight of every trainable token of a batch, so that the weighted sum is the batch loss.

    With N tokens, K attempts, G groups:

        token_mean       1 / N                              DAPO, arXiv:2503.14476, equation 8
        sequence_mean    1 / (K * tokens of the attempt)    GRPO, arXiv:2402.03300, equation 3
        group_mean       1 / (G * tokens of the group)
        fixed_length     1 / (K * fixed_length)             Dr. GRPO, arXiv:2503.20783, section 3.2

    Args:
        attempts: int64[N], for each trainable token a number that stands for its attempt.
        aggregation: one of these names.
        groups: int64[N], the same for its group; needed by group_mean alone.
        fixed_length: the divisor of fixed_length, tokens; greater than 0 there.

    Returns:
        float64[N]; sums to 1 unless N is 0, but with fixed_length.
    """
    if not len(attempts):
        return np.empty(0)
    if aggregation == "token_mean":
        return np.full(len(attempts), 1.0 / len(attempts))
    if aggregation == "sequence_mean":
        return _shared(attempts)
    if aggregation == "group_mean":
        if groups is None:
            raise ValueError("group_mean needs to know the group of every token")
        return _shared(groups)
    if aggregation == "fixed_length":
        if fixed_length < 1:
            raise ValueError("fixed_length needs a number of tokens")
        return np.full(len(attempts), 1.0 / (len(np.unique(attempts)) * fixed_length))
    raise ValueError(f"unknown aggregation {aggregation!r}")


def _shared(members: IntArray) -> FloatArray:
    """Every member has the same weight, and its tokens share it."""
    _, index, counts = np.unique(members, return_inverse=True, return_counts=True)
    return 1.0 / (len(counts) * counts[index])
