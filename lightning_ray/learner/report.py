"""What one training step did, in numbers that mean the same for any number of ranks and rows."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """A step of the learner group; averages are over the trainable tokens of the whole batch."""

    step: int
    """Steps asked for so far, this one included, skipped ones too."""
    skipped: str | None
    """Why the weights were left as they were; None where they were changed."""
    loss: float
    grad_norm: float
    """Norm of the gradient before clipping; infinite where it was not finite."""
    learning_rate: float
    seconds: float
    sampled_tokens: int
    """Trainable tokens learnt from."""
    unlearnable_tokens: int
    """Trainable tokens that nothing predicts, because they begin a sequence."""
    total_tokens: int
    """Sum of the lengths of the sequences: tokens as a user counts them."""
    computed_tokens: int
    """Distinct tokens that went through the model; the rest was shared."""
    rows: int
    logprob_difference: float
    """Mean of learner logprob minus recorded logprob."""
    logprob_abs_difference: float
    """Mean of its absolute value: how well learner and engine agree."""
    clip_fraction: float
    """Share of the tokens whose gradient the clip removed."""
    masked_fraction: float
    """Share of the tokens that the off-policy correction left out."""
    divergence: float
    """Mean divergence from the reference, k3, in nats; 0 where there is no reference."""
    value_error: float
    """Mean squared error of the critic's values; 0 where there is no critic."""
    entropy: float
    """Mean entropy of the policy where it sampled, in nats."""
    ratio_mean: float
    ratio_max: float
    min_version: int
    """Oldest version that sampled a token of the batch; -1 for an empty batch."""
    max_version: int
    """Newest one."""

    def metrics(self) -> dict[str, float]:
        """What a run tracks of it, by name."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "entropy": self.entropy,
            "clip_fraction": self.clip_fraction,
            "masked_fraction": self.masked_fraction,
            "divergence": self.divergence,
            "value_error": self.value_error,
            "logprob_abs_difference": self.logprob_abs_difference,
            "ratio_mean": self.ratio_mean,
            "tokens_batch": float(self.total_tokens),
            "tokens_computed": float(self.computed_tokens),
            "learning_rate": self.learning_rate,
        }


def averages(totals: Mapping[str, float]) -> dict[str, float]:
    """Those of a report's fields that are averages over tokens, from the sums of `Totals`."""
    tokens = max(1.0, totals["tokens"])
    sums = {
        "logprob_difference": "difference_sum",
        "logprob_abs_difference": "abs_difference_sum",
        "clip_fraction": "clipped",
        "masked_fraction": "masked",
        "divergence": "divergence_sum",
        "value_error": "value_error_sum",
        "entropy": "entropy_sum",
        "ratio_mean": "ratio_sum",
    }
    means = {name: totals[total] / tokens for name, total in sums.items()}
    return {**means, "ratio_max": totals["ratio_max"]}
