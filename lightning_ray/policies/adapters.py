"""A version that is an adapter: low-rank additions in a folder of their own, without the model.

The folder is as peft writes it (`adapter_config.json`, `adapter_model.safetensors`), so that peft
and vLLM load it as well, and takes a few per cent of the model's room. The model that it belongs to
must stay where the folder says.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import UserError
from lightning_ray.policies.additions import factor_parts, factors

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KINDS = (".lora_A.weight", ".lora_B.weight")
# What changes more than W + alpha / r B A, by its name in peft, with what it is where it is unused.
_UNSUPPORTED = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "bias": ("none", None),
}


@dataclass(frozen=True)
class Adapter:
    """Additions to a model's weights, on disk."""

    folder: Path
    base: Path
    """The folder of the model that they belong to."""
    scale: float
    """What they are multiplied by."""

    def additions(self) -> Iterator[tuple[str, "Tensor"]]:
        """The factors, named as by `factors`.

        Raises UserError for a tensor that is no factor.
        """
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield self._factor(name), file.get_tensor(name)

    def _factor(self, name: str) -> str:
        for place, kind in enumerate(_KINDS):
            if name.startswith(_PREFIX) and name.endswith(kind):
                return factors(f"{name.removeprefix(_PREFIX).removesuffix(kind)}.weight")[place]
        raise UserError(
            f"{self.folder / WEIGHTS}: {name} is no addition to a weight; merge the adapter into "
            "its model with peft, and name the whole model"
        )


def peft_name(factor: str) -> str:
    """What peft and vLLM call a factor that is named as by `factors`."""
    weight, place = factor_parts(factor)
    return f"{_PREFIX}{weight.removesuffix('.weight')}{_KINDS[place]}"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (folder / SETTINGS).is_file() and not (folder / "config.json").is_file()


def model_folder(folder: Path) -> Path:
    """Where a version's configuration and tokenizer are: its folder, or that of its model.

    Raises UserError as `read_adapter` does.
    """
    adapter = read_adapter(folder)
    return folder if adapter is None else adapter.base


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter that a folder holds; None where it holds a whole model.

    Raises UserError when it is one that is no sum of weights and additions, or when a file of it or
    the model's folder is not there.
    """
    if not is_adapter(folder):
        return None
    path = folder / SETTINGS
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
        scale = float(settings["lora_alpha"]) / int(settings["r"])
        base = Path(str(settings["base_model_name_or_path"])).expanduser()
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not say what it adds to ({error!r}); copy the folder again"
        ) from error
    for name, unused in _UNSUPPORTED.items():
        if settings.get(name) not in unused:
            raise UserError(
                f"{path}: an adapter with {name}={settings[name]} cannot be put into weights here; "
                "merge it into its model with peft, and name the whole model"
            )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"adapter folder {folder} lacks {WEIGHTS}; copy it there")
    if not base.is_dir():
        raise UserError(
            f"the adapter {folder} belongs to the model {base}, which is no folder here; put its "
            f"folder there, or correct base_model_name_or_path in {path}"
        )
    return Adapter(folder, base, scale)
