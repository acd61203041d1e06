"""Low-rank additions: trained alone, and one policy merged, as an adapter, or in the learner."""

import dataclasses
from pathlib import Path

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
from learner_support import load_plain, plain_loss
from test_learner_worker import (
    LOSS,
    PLAIN,
    largest_difference,
    on_policy,
    samples,
    start,
    weights,
)

from lightning_ray.errors import UserError
from lightning_ray.learner.config import LoraConfig

LORA = LoraConfig(rank=4, alpha=8.0)
STEPS = 3


def trained(model_dir: Path, **changes: object):
    config = dataclasses.replace(PLAIN, learning_rate=0.02, adam_epsilon=1e-8)
    worker = start(model_dir, config, **changes)
    for _ in range(STEPS):
        assert worker.step(on_policy(worker, samples()), LOSS).skipped is None
    return worker


def logprobs(model: torch.nn.Module, batch: pa.Table) -> np.ndarray:
    return np.concatenate(plain_loss(model, batch, "token_mean", 0.9, 5.0)[1])


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_merged_weights_an_adapter_and_the_learner_are_one_policy(
    model_dir, tmp_path, zero_stage
) -> None:
    batch, found = samples(), {}
    for publish in ("merged", "adapter"):
        lora = dataclasses.replace(LORA, publish=publish)
        worker = trained(model_dir, lora=lora, zero_stage=zero_stage)
        worker.publish(str(tmp_path / publish))
        found[publish] = np.concatenate(worker.logprobs(batch))
    np.testing.assert_array_equal(found["merged"], found["adapter"])
    merged = load_plain(tmp_path / "merged")
    adapter = peft.PeftModel.from_pretrained(load_plain(model_dir), tmp_path / "adapter")
    np.testing.assert_allclose(logprobs(merged, batch), found["merged"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logprobs(adapter, batch), found["merged"], rtol=1e-4, atol=1e-4)
    # It moved, and the adapter is a small part of a model.
    assert np.abs(found["merged"] - logprobs(load_plain(model_dir), batch)).max() > 0.1
    sizes = [
        (tmp_path / folder / file).stat().st_size
        for folder, file in (
            ("adapter", "adapter_model.safetensors"),
            ("merged", "model.safetensors"),
        )
    ]
    assert sizes[0] < sizes[1] / 3


def test_only_the_additions_are_trained_and_a_resumed_run_goes_on_with_them(
    model_dir, tmp_path
) -> None:
    base = dict(load_plain(model_dir).named_parameters())
    worker = trained(model_dir, lora=LORA)
    now = weights(worker)
    kept = {name.replace(".base_layer", ""): w for name, w in now.items() if "lora_" not in name}
    assert largest_difference(kept, base) == 0
    worker.save_checkpoint(str(tmp_path / "saved"), {})
    config = dataclasses.replace(PLAIN, learning_rate=0.02, adam_epsilon=1e-8)
    resumed = start(model_dir, config, lora=LORA)
    resumed.load_checkpoint(str(tmp_path / "saved"))
    batch = on_policy(worker, samples())
    worker.step(batch, LOSS)
    resumed.step(batch, LOSS)
    assert largest_difference(weights(resumed), weights(worker)) == 0
    assert largest_difference(weights(resumed), now) > 0


def test_additions_at_the_beginning_change_nothing(model_dir) -> None:
    batch = samples()
    worker = start(model_dir, lora=LORA)
    np.testing.assert_allclose(
        np.concatenate(worker.logprobs(batch)),
        logprobs(load_plain(model_dir), batch),
        rtol=1e-4,
        atol=1e-4,
    )


def test_modules_can_be_named_and_one_that_is_not_there_is_said(model_dir, tmp_path) -> None:
    named = dataclasses.replace(LORA, targets=["q_proj", "v_proj"], publish="adapter")
    worker = start(model_dir, lora=named)
    added = {
        name.rsplit(".", 3)[0].rpartition(".")[2] for name in weights(worker) if "lora_A" in name
    }
    assert added == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"learner.lora.targets=\['nothing'\]"):
        start(model_dir, lora=dataclasses.replace(LORA, targets=["nothing"]))
    for targets in (["embed_tokens"], ["q_proj", "lm_head"]):
        with pytest.raises(UserError, match="cannot have an addition"):
            start(model_dir, lora=dataclasses.replace(LORA, targets=targets))


def test_a_checkpoint_of_other_additions_is_refused(model_dir, tmp_path) -> None:
    worker = trained(model_dir, lora=LORA)
    worker.save_checkpoint(str(tmp_path / "saved"), {})
    for other in ({"alpha": 16.0}, {"targets": ["q_proj"]}, {"rank": 2}):
        another = start(model_dir, lora=dataclasses.replace(LORA, **other))
        with pytest.raises(UserError, match=rf"was saved with learner.lora.{next(iter(other))}="):
            another.load_checkpoint(str(tmp_path / "saved"))
