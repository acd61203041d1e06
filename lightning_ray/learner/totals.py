"""The metrics of a step, added up over the parts of a batch and then over the ranks."""

import torch
from torch import Tensor

SUMS = (
    "loss",
    "tokens",
    "entropy_sum",
    "clipped",
    "masked",
    "ratio_sum",
    "divergence_sum",
    "value_error_sum",
    "difference_sum",
    "abs_difference_sum",
)
MAXIMUM = "ratio_max"


class Totals:
    """Sums of metrics, and one maximum; a rank without a row has zeros."""

    def __init__(self, device: torch.device):
        self._device = device
        self._values: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """A part's metrics, scalars without gradient."""
        for name, value in metrics.items():
            before = self._values.get(name, torch.zeros_like(value))
            together = torch.maximum(before, value) if name == MAXIMUM else before + value
            self._values[name] = together

    def of_all_ranks(self) -> dict[str, float]:
        """What they come to over all ranks; every rank calls this at the same time."""
        zero = torch.zeros((), device=self._device)
        sums = torch.stack([self._values.get(name, zero) for name in SUMS]).double()
        largest = self._values.get(MAXIMUM, zero).double()
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return dict(zip(SUMS, sums.tolist(), strict=True)) | {MAXIMUM: largest.item()}
