"""The losses against TRL's own numbers, which `benchmarks/peers/trl_losses.py` recorded."""

import json
from pathlib import Path

import pytest
import torch

from lightning_ray.algorithms import LossConfig, token_weights
from lightning_ray.algorithms.config import KlConfig
from lightning_ray.algorithms.losses import Part, policy_loss

RECORDED = json.loads((Path(__file__).parent / "recorded/trl_losses.json").read_text())
OURS = {
    "grpo": LossConfig(aggregation="sequence_mean"),
    "grpo with a reference": LossConfig(aggregation="sequence_mean", kl=KlConfig(0.3)),
    "dapo": LossConfig(epsilon_high=0.28),
    "dr_grpo": LossConfig(aggregation="fixed_length", fixed_length=RECORDED["longest"]),
    "gspo": LossConfig(kind="sequence_clipped", aggregation="sequence_mean"),
    # TRL names the bound itself, and has none below.
    "cispo": LossConfig(kind="clipped_weight", epsilon_low=1.0, epsilon_high=0.5),
}


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["case"].replace(" ", "-"))
def test_loss_and_gradient_are_those_of_trl(case: dict) -> None:
    config = OURS[case["case"]]
    mask = torch.tensor(case["mask"]).bool()
    rows = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
    new = torch.tensor(case["new"], requires_grad=True)
    weights = token_weights(rows.numpy(), config.aggregation, fixed_length=config.fixed_length)
    part = Part(
        logprobs=new[mask],
        old_logprobs=torch.tensor(case["old"])[mask],
        advantages=torch.tensor(case["advantages"])[rows],
        weights=torch.from_numpy(weights),
        sequence=rows,
        reference=torch.tensor(case["reference"])[mask],
    )
    loss, _ = policy_loss(part, config)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(new.grad, torch.tensor(case["gradient"]), rtol=1e-4, atol=1e-6)


def test_every_case_is_there() -> None:
    assert {case["case"] for case in RECORDED["cases"]} == set(OURS)
    assert RECORDED["trl"].startswith("1.")
