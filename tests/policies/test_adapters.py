"""Folders of adapters: what is read of them, and what of them cannot be."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_ray.errors import UserError
from lightning_ray.learner import check_model_dir
from lightning_ray.policies.adapters import (
    SETTINGS,
    WEIGHTS,
    is_adapter,
    model_folder,
    peft_name,
    read_adapter,
)
from lightning_ray.policies.additions import factor_parts, factors
from lightning_ray.policies.models import resolve_model

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return written(tmp_path / "adapter", {name: torch.ones(1) for name in factors(Q)}, base)


def written(folder: Path, sent: dict[str, torch.Tensor], base: Path, **settings: object) -> Path:
    folder.mkdir()
    save_file({peft_name(name): value for name, value in sent.items()}, folder / WEIGHTS)
    said = {"r": 4, "lora_alpha": 8.0, "base_model_name_or_path": str(base)} | settings
    (folder / SETTINGS).write_text(json.dumps(said))
    return folder


@given(st.lists(st.text("abc_0123456789.", min_size=1), min_size=1, unique=True))
def test_factors_keep_their_names_on_the_way_through_a_folder(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    top = tmp_path_factory.mktemp("named")
    sent = {
        factor: torch.full((1,), float(number))
        for number, name in enumerate(names)
        for factor in factors(f"{name}.weight")
    }
    found = read_adapter(written(top / "adapter", sent, top))
    assert found is not None and found.scale == 2.0
    again = dict(found.additions())
    assert again == sent
    assert {factor_parts(name) for name in again} == {
        (f"{name}.weight", place) for name in names for place in (0, 1)
    }


def test_an_adapter_is_a_model_where_its_own_is_whole(adapter: Path, base: Path) -> None:
    assert resolve_model(str(adapter)) == adapter
    assert is_adapter(adapter) and not is_adapter(base)
    assert model_folder(adapter) == base == model_folder(base)
    assert read_adapter(base) is None
    (base / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"model folder .*base lacks a tokenizer"):
        resolve_model(str(adapter))


def test_an_adapter_whose_model_or_weights_are_gone_is_refused(adapter: Path, base: Path) -> None:
    base.rename(base.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"belongs to the model .*base, which is no folder here"):
        resolve_model(str(adapter))
    base.with_name("elsewhere").rename(base)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"lacks {WEIGHTS}"):
        resolve_model(str(adapter))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "does not say what it adds to"),
        ("{}", "does not say what it adds to"),
        ('{"r": 0, "lora_alpha": 1, "base_model_name_or_path": "x"}', "does not say what"),
        ('{"r": 1, "lora_alpha": 1, "use_dora": true}', "does not say what"),
    ],
)
def test_settings_that_say_too_little_are_refused(adapter: Path, text: str, said: str) -> None:
    (adapter / SETTINGS).write_text(text)
    with pytest.raises(UserError, match=said):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_dora", True), ("use_rslora", True), ("rank_pattern", {"q_proj": 2}), ("bias", "all")],
)
def test_what_is_no_sum_of_weights_and_additions_is_refused(
    tmp_path: Path, base: Path, name: str, value: object
) -> None:
    folder = written(tmp_path / "adapter", {}, base, **{name: value})
    with pytest.raises(UserError, match=f"with {name}=.* merge it into its model with peft"):
        read_adapter(folder)


def test_a_tensor_that_is_no_factor_is_refused(adapter: Path) -> None:
    save_file({"base_model.model.lm_head.weight": torch.ones(1)}, adapter / WEIGHTS)
    found = read_adapter(adapter)
    assert found is not None
    with pytest.raises(UserError, match=r"lm_head\.weight is no addition to a weight"):
        dict(found.additions())


def test_an_adapter_is_not_what_is_trained(adapter: Path) -> None:
    with pytest.raises(UserError, match="is an adapter, and a whole model is trained"):
        check_model_dir(adapter)
