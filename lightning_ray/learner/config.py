"""What can be set of the learner, and what of it, or of a model, cannot work.

Invariant: checked without importing torch or DeepSpeed, before any actor starts.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from lightning_ray.errors import UserError
from lightning_ray.policies.adapters import is_adapter

DTYPES = ("auto", "bf16", "fp32")
ZERO_STAGES = (0, 1, 2, 3)
SCHEDULES = ("constant", "linear", "cosine")
PUBLISHED = ("merged", "adapter")
RATE = "rate"
"""The key of a parameter group's learning rate, times that of the policy."""
WEIGHT_INDEX = "model.safetensors.index.json"


@dataclass
class LoraConfig:
    """Training low-rank additions to some matrices in place of the weights (arXiv:2106.09685)."""

    rank: int = 0
    """Rank of the additions; 0 trains every weight."""
    alpha: float = 32.0
    """An addition counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the modules that get one, as peft takes them; all-linear is all but the head."""
    publish: str = "merged"
    """merged: a whole model with the additions in its weights. adapter: the additions alone."""


@dataclass
class LearnerConfig:
    """Settings of the DeepSpeed actor group."""

    num_ranks: int = 1
    """Actors that train together; a batch is split over them."""
    dtype: str = "auto"
    """bf16: weights and activations in bfloat16 over fp32 master weights. fp32: all in fp32.
    auto: bf16, but fp32 where the first rank's processor has no instructions for it."""
    zero_stage: int = 1
    """What is split over the ranks. 0: nothing. 1: optimiser state. 2: gradients too. 3: weights
    too."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    critic_rate: float = 0.0
    """Learning rate of a critic's values, times that of the policy; 0: no critic. A job sets it
    from `algorithm.loss.critic`."""
    learning_rate: float = 1e-5
    """At its highest, see `schedule`."""
    schedule: str = "constant"
    """constant, linear or cosine: how the learning rate falls after the warm-up."""
    warmup_steps: int = 0
    """Steps in which it rises to its highest, in equal parts."""
    schedule_steps: int = 0
    """Steps after which it has fallen to its lowest; linear and cosine need it."""
    final_rate: float = 0.0
    """The lowest, as a share of the highest."""
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    tokens_per_row: int = 512
    """Distinct tokens computed in one forward and backward pass, at most (a single sequence that
    is longer gets a row of its own). Attention costs its square, small rows waste the machine."""
    logits_chunk: int = 512
    """Positions whose logits are alive at one time; times the vocabulary times 4 bytes."""
    activation_checkpointing: bool = False
    """Keep only layer boundaries for the backward pass: less memory, a third more time."""
    compile: bool = False
    """On a GPU: compile the model's layers too (torch.compile), which takes some 15 s at the first
    step. Not with zero_stage 3, which gathers weights layer by layer."""
    seed: int = 0
    num_threads: int = 2
    """CPU threads per rank."""
    num_cpus: float = 1.0
    """What an actor asks of Ray."""
    num_gpus: float = 0.0
    """What an actor asks of Ray; 0 trains on the CPU."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have for an actor to be placed there (Ray's label selectors)."""
    start_timeout_s: float = 600.0
    """How long the group may take to load the model and meet."""


def check_learner(config: LearnerConfig) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: a setting outside its range.
    """
    _one_of("dtype", config.dtype, DTYPES)
    _one_of("zero_stage", config.zero_stage, ZERO_STAGES)
    _one_of("schedule", config.schedule, SCHEDULES)
    _one_of("lora.publish", config.lora.publish, PUBLISHED)
    _check_schedule(config)
    _check_lora(config)
    if config.compile and config.zero_stage == 3:
        raise UserError("learner.compile=true does not go with learner.zero_stage=3; drop one")
    if config.compile and config.num_gpus == 0:
        raise UserError("learner.compile=true is for a GPU; set learner.compile=false")
    for name in ("num_ranks", "tokens_per_row", "logits_chunk", "num_threads"):
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"learner.{name}: {value} must be at least 1")
    for name in ("learning_rate", "adam_epsilon", "start_timeout_s"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"learner.{name}: {value} must be a number greater than 0")
    for name in ("weight_decay", "max_grad_norm", "num_cpus", "num_gpus", "critic_rate"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"learner.{name}: {value} must be a number that is not negative")
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise UserError(f"learner.{name}: {value} must be at least 0 and less than 1")


def _check_schedule(config: LearnerConfig) -> None:
    if config.warmup_steps < 0:
        raise UserError(f"learner.warmup_steps: {config.warmup_steps} must be 0 or more")
    if not 0 <= config.final_rate <= 1:
        raise UserError(f"learner.final_rate: {config.final_rate} must lie between 0 and 1")
    if config.schedule != "constant" and config.schedule_steps <= config.warmup_steps:
        raise UserError(
            f"learner.schedule_steps: {config.schedule_steps} must be more than "
            f"learner.warmup_steps={config.warmup_steps} for learner.schedule={config.schedule}; "
            "training.steps is a good number"
        )


def _check_lora(config: LearnerConfig) -> None:
    if config.lora.rank < 0:
        raise UserError(f"learner.lora.rank: {config.lora.rank} must be 0 or more")
    if not (math.isfinite(config.lora.alpha) and config.lora.alpha > 0):
        raise UserError(f"learner.lora.alpha: {config.lora.alpha} must be a number greater than 0")
    if not config.lora.targets:
        raise UserError("learner.lora.targets is empty; name modules, or all-linear")


def check_model_dir(model_dir: str | Path) -> Path:
    """Refuse a model folder that cannot be trained.

    Returns:
        The folder, absolute.

    Raises:
        UserError: a folder or file is missing or unreadable, or the model computes something that
            the shared-prefix pass would not reproduce.
    """
    folder = Path(model_dir).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; name a Hugging Face model folder")
    if is_adapter(folder):
        raise UserError(
            f"{folder} is an adapter, and a whole model is trained; name the model that it belongs "
            "to, or merge the two with peft first"
        )
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"model folder {folder} has no config.json; is it a Hugging Face model?")
    try:
        config = json.loads(config_path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{config_path} is not JSON ({error}); fetch the model again") from error
    _check_weights(folder)
    _check_architecture(config, config_path)
    return folder


def _check_weights(folder: Path) -> None:
    """Every weight file that the folder promises is there and is not empty."""
    index = folder / WEIGHT_INDEX
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise UserError(f"{index} cannot be read; fetch the model again") from error
    for name in sorted(names):
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            raise UserError(f"model folder {folder} has no {name}; fetch the model again")


def _check_architecture(config: dict[str, object], path: Path) -> None:
    """The learner runs full attention and a plain output head; say so where a model needs more."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{path}: only models with full attention in every layer can be trained")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UserError(f"{path}: a model with a sliding attention window cannot be trained yet")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if config.get(name) not in (None, 1, 1.0):
            raise UserError(f"{path}: a model with {name} cannot be trained yet")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = " or ".join(str(choice) for choice in allowed)
        raise UserError(f"learner.{name}: {value!r} is unknown; use {choices}")
