"""Models on their way into the learner."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from lightning_ray.errors import UserError
from lightning_ray.learner.config import LearnerConfig
from lightning_ray.learner.forward import PolicyModule
from lightning_ray.learner.lora import add_lora
from lightning_ray.learner.tree_attention import use_tree_attention


def load_policy(model_dir: Path, config: LearnerConfig, dtype: torch.dtype) -> PolicyModule:
    """The model of a folder, ready to be trained.

    Raises UserError as `add_lora`, and for a model that cannot be compiled.
    """
    model = _load(model_dir, dtype, config)
    if config.lora.rank:
        add_lora(model, config.lora)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile and config.num_gpus > 0:
        # Layer by layer: all are the same code, which is compiled once.
        layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
        if not layers:
            raise UserError(
                f"{model_dir}: {type(model).__name__} has no layers of the kind that can be "
                "compiled; set learner.compile=false"
            )
        for layer in layers:
            layer.compile()
    return PolicyModule(model, config.logits_chunk, config.critic_rate > 0)


def load_reference(model_dir: Path, config: LearnerConfig, dtype: torch.dtype) -> PolicyModule:
    """The model of a folder as it is, to be asked alone."""
    model = _load(model_dir, dtype, config).eval().requires_grad_(False)
    return PolicyModule(model, config.logits_chunk)


def _load(model_dir: Path, dtype: torch.dtype, config: LearnerConfig) -> PreTrainedModel:
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    if config.num_gpus > 0:
        use_tree_attention(model)
    model.config.use_cache = True  # what is published is for generating
    return model
