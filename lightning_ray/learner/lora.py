"""Low-rank additions to a model's matrices, by peft: made, and put into the weights again.

LoRA (Hu et al., 2021, arXiv:2106.09685): W x becomes W x + alpha / rank B A x, of which A and B are
trained and W is not. B is zero at the beginning, so the model is then what it was.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_ray.errors import UserError
from lightning_ray.learner.config import LoraConfig
from lightning_ray.policies.adapters import SETTINGS, WEIGHTS, peft_name
from lightning_ray.policies.additions import factors, with_addition

ADAPTER = "default"
_BASE = ".base_layer."


def add_lora(model: Any, config: LoraConfig) -> None:
    """Gives the model its additions in place; everything else no longer has a gradient.

    Raises:
        UserError: no module of the model is called as `config.targets` says, or it is the input
            embedding or the output head, which the learner computes by itself.
    """
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(_settings(config), model, ADAPTER)
    except ValueError as error:
        raise UserError(f"learner.lora.targets={config.targets}: {error}") from error
    for place in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(place, "base_layer"):
            raise UserError(
                f"learner.lora.targets={config.targets}: the input embedding and the output head "
                "cannot have an addition; name other modules, or all-linear"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged_weights(weights: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A whole model's weights under its own names, the additions put in.

    `weights` are those of a model with additions, by name, gathered from all ranks.
    """
    scale = scale_of(config)
    merged = {}
    for name, value in weights.items():
        if "lora_" in name:
            continue
        if _BASE not in name:
            merged[name] = value
            continue
        module, _, kind = name.partition(_BASE)
        if kind == "weight":
            down = weights[f"{module}.lora_A.{ADAPTER}.weight"]
            up = weights[f"{module}.lora_B.{ADAPTER}.weight"]
            value = with_addition(value, down, up, scale)
        merged[f"{module}.{kind}"] = value
    return merged


def scale_of(config: LoraConfig) -> float:
    """What B A is multiplied by."""
    return config.alpha / config.rank


def sent_names(weights: Iterable[str]) -> dict[str, str]:
    """What the factors among a model's weights are called on their way, by their names here."""
    names = {}
    for name in weights:
        for place, kind in enumerate((".lora_A.", ".lora_B.")):
            module, found, _ = name.partition(kind)
            if found:
                names[name] = factors(f"{module}.weight")[place]
    return names


def write_adapter(
    folder: Path, sent: Mapping[str, Tensor], base: Path, config: LoraConfig, model: nn.Module
) -> None:
    """Writes an adapter's folder.

    Args:
        sent: the factors, called as on their way (`sent_names`).
        base: the folder of the model without them.
        model: the model with them.
    """
    save_file({peft_name(name): value for name, value in sent.items()}, folder / WEIGHTS)
    settings = _settings(config).to_dict()
    # What was found stands there, not what was asked for: all-linear is no module's name.
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    settings |= {"base_model_name_or_path": str(base), "target_modules": sorted(found)}
    plain = {name: value for name, value in settings.items() if not isinstance(value, set)}
    (folder / SETTINGS).write_text(json.dumps(plain, indent=2, default=str))


def _settings(config: LoraConfig) -> Any:
    import peft

    targets: Any = config.targets[0] if config.targets == ["all-linear"] else list(config.targets)
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
