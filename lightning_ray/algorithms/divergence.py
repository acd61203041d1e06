"""How far the policy is from a reference, estimated on the tokens that were sampled.

With d = logprob - reference_logprob of a token (Schulman, 2020, "Approximating KL divergence"):

    k1 = d                          unbiased, of either sign
    k2 = d^2 / 2                    biased, never negative; its gradient is that of the divergence
    k3 = exp(-d) - 1 + d            unbiased, never negative

Their values are estimates of KL(policy || reference) when the policy sampled the tokens. As a loss,
k1 has a gradient of expectation zero, so k2 or k3 belong there and k1 into the reward.
"""

from torch import Tensor


def estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """The divergence at each token, in nats.

    Args:
        logprobs: float32[N], natural logarithms under the policy.
        reference: float32[N], under the reference.
        estimator: "k1", "k2" or "k3".
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return (-difference).expm1() + difference
    raise ValueError(f"unknown estimator {estimator!r}")
