"""Models on their way into the learner."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lightning_ray.learner.config import LearnerConfig
from lightning_ray.learner.forward import PolicyModule
from lightning_ray.learner.lora import add_lora


def load_policy(model_dir: Path, config: LearnerConfig, dtype: torch.dtype) -> PolicyModule:
    """The model of a folder, ready to be trained. Raises UserError as `add_lora`."""
    model = _load(model_dir, dtype)
    if config.lora.rank:
        add_lora(model, config.lora)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModule(model, config.logits_chunk, config.critic_rate > 0)


def load_reference(model_dir: Path, config: LearnerConfig, dtype: torch.dtype) -> PolicyModule:
    """The model of a folder as it is, to be asked alone."""
    return PolicyModule(_load(model_dir, dtype).eval().requires_grad_(False), config.logits_chunk)


def _load(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    model.config.use_cache = True  # what is published is for generating
    return model
