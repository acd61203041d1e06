"""TRL's own GRPO losses on random numbers, recorded for `tests/algorithms/test_trl_losses.py`.

    .bench/trl/bin/python benchmarks/peers/trl_losses.py tests/algorithms/recorded/trl_losses.json

Runs in TRL's environment (`benchmarks/requirements/trl.txt`; `peer_environment.peer_python("trl")`
makes it) and uses the loss of its trainer, which is handed logprobs in place of a model.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from trl import GRPOTrainer

ROWS, LENGTH, LONGEST = 6, 8, 16

# What TRL is told; what it is in our configuration stands in the test.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo with a reference": {"loss_type": "grpo", "beta": 0.3},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
}


def numbers(seed: int) -> dict[str, torch.Tensor]:
    """A batch of answers of unequal length, as logprobs."""
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    new = -some(ROWS, LENGTH).abs()
    lengths = torch.randint(1, LENGTH + 1, (ROWS,), generator=random)
    return {
        "new": new,
        "old": new + 0.3 * some(ROWS, LENGTH),
        "reference": new + 0.5 * some(ROWS, LENGTH),
        "advantages": some(ROWS),
        "mask": (torch.arange(LENGTH)[None, :] < lengths[:, None]).long(),
    }


def loss_of(
    case: dict[str, Any], given: dict[str, torch.Tensor]
) -> tuple[float, list[list[float]]]:
    """TRL's loss, and its gradient by the new logprobs."""
    new = given["new"].clone().requires_grad_()
    trainer = SimpleNamespace(
        loss_type=case["loss_type"],
        beta=case.get("beta", 0.0),
        epsilon_low=0.2,
        epsilon_high=case.get("epsilon_high", 0.2),
        importance_sampling_level=case.get("importance_sampling_level", "token"),
        max_completion_length=LONGEST,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": MagicMock()},
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": given["mask"],
        "advantages": given["advantages"],
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": given["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad.tolist()


def main() -> None:
    """Writes the file."""
    cases = []
    for name, case in CASES.items():
        for seed in range(3):
            given = numbers(seed)
            loss, gradient = loss_of(case, given)
            plain = {key: value.tolist() for key, value in given.items()}
            cases.append({"case": name, **plain, "loss": loss, "gradient": gradient})
    recorded = {"trl": trl.__version__, "longest": LONGEST, "cases": cases}
    Path(sys.argv[1]).write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    main()
