"""Low-rank additions: trained alone, and one policy merged, as an adapter, or in the learner."""

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
from learner_support import load_plain, plain_loss
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_learner_worker import (
    LOSS,
    PLAIN,
    largest_difference,
    on_policy,
    samples,
    start,
    weights,
)

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.learner import publishing
from lightning_ray.learner.config import LoraConfig
from lightning_ray.learner.lora import merged_weights
from lightning_ray.policies.adapters import read_adapter
from lightning_ray.policies.additions import factors, weight_of, with_additions
from lightning_ray.policies.handover import Checksum, Way

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


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_the_factors_travel_and_the_whole_model_lies_on_disk(
    model_dir, tmp_path, monkeypatch, zero_stage, dtype
) -> None:
    """To the bit: whoever adds them to the base has the model that the folder has."""
    worker = trained(model_dir, lora=LORA, zero_stage=zero_stage, dtype=dtype)
    stepped = threading.Event()

    def merged_later(*what: Any) -> dict[str, torch.Tensor]:
        assert stepped.wait(60)
        return merged_weights(*what)

    monkeypatch.setattr(publishing, "merged_weights", merged_later)
    base = load_file(model_dir / "model.safetensors")
    for number in (1, 2):
        folder = tmp_path / str(number)
        handed = worker.hand_over(str(folder), Way.shared_memory)
        with safe_open(handed.memory, framework="pt") as file:
            sent = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert (handed.base, handed.scale) == (str(model_dir), 2.0)
        found = dict(with_additions(base.items(), sent, handed.scale))
        # Training goes on before the folder is written.
        worker.step(on_policy(worker, samples()), LOSS)
        stepped.set()
        worker.settle(30.0)
        stepped.clear()
        written = load_file(folder / "model.safetensors")
        assert written.keys() == found.keys()
        kept = {name: tensor.to(written[name].dtype) for name, tensor in base.items()}
        changed = [name for name in written if not torch.equal(written[name], kept[name])]
        assert {weight_of(name) for name in sent} == set(changed)
        assert (
            folder / "model.safetensors"
        ).stat().st_mode & 0o044 == folder.stat().st_mode & 0o044
        assert all(torch.equal(written[name], found[name]) for name in written)
        whole = sum(tensor.nbytes for tensor in written.values())
        assert handed.nbytes == sum(tensor.nbytes for tensor in sent.values()) < whole / 3


@pytest.mark.parametrize("way", [Way.shared_memory, Way.disk])
@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "fp32"), (3, "bf16")])
def test_an_adapter_is_handed_over_and_is_all_that_lies_on_disk(
    model_dir, tmp_path, zero_stage, dtype, way
) -> None:
    """To the bit: what is read of its folder, and checked, is what was sent."""
    lora = dataclasses.replace(LORA, publish="adapter")
    worker = trained(model_dir, lora=lora, zero_stage=zero_stage, dtype=dtype)
    worker.publish(str(tmp_path / "published"))
    handed = worker.hand_over(str(tmp_path / "handed"), way)
    worker.settle(30.0)
    found = [read_adapter(tmp_path / name) for name in ("published", "handed")]
    assert all(one is not None and one.base == model_dir and one.scale == 2.0 for one in found)
    published, again = (dict(one.additions()) for one in found if one is not None)
    assert published.keys() == again.keys()
    assert all(torch.equal(again[name], published[name]) for name in published)
    checksum = Checksum()
    assert len(list(checksum.through(again.items()))) == len(published)
    assert checksum.hexdigest() == handed.digest
    assert handed.base == ("" if way is Way.disk else str(model_dir))
    assert sorted(path.name for path in (tmp_path / "handed").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_to_a_base_with_other_names_is_refused(model_dir, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    renamed = {f"x.{n}": t for n, t in load_file(base / "model.safetensors").items()}
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"learner.lora.publish=adapter: .* use merged"):
        start(base, lora=dataclasses.replace(LORA, publish="adapter"))


def test_where_the_base_has_other_names_the_whole_model_travels(model_dir, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    worker = trained(base, lora=LORA)
    renamed = {f"x.{n}": t for n, t in load_file(base / "model.safetensors").items()}
    save_file(renamed, base / "model.safetensors")
    handed = worker.hand_over(str(tmp_path / "1"), Way.shared_memory)
    worker.settle(30.0)
    written = load_file(tmp_path / "1" / "model.safetensors")
    assert handed.base == "" and handed.nbytes == sum(t.nbytes for t in written.values())


def test_additions_to_nothing_are_refused() -> None:
    sent = {name: torch.zeros(2, 2) for name in factors("no.weight")}
    with pytest.raises(InfrastructureError, match=r"does not have: no\.weight"):
        list(with_additions({"a.weight": torch.zeros(2, 2)}.items(), sent, 1.0))


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
