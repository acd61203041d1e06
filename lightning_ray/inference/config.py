"""Configuration of the inference group (Hydra group `inference`)."""

from dataclasses import dataclass, field
from typing import Any

from lightning_ray.errors import UserError

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class InferenceConfig:
    """The vLLM engines that answer the agents' calls."""

    num_engines: int = 1
    """Engines in the group, each an actor with its own copy of the weights."""
    max_model_len: int = 2048
    """Longest prompt plus answer, tokens."""
    max_num_seqs: int = 64
    """Calls that one engine computes at the same time."""
    dtype: str = "auto"
    """Type of the weights and of the computation. auto: bfloat16, but float32 on a processor that
    has no instructions for bfloat16 and computes it several times slower."""
    kv_cache_gib: float = 1.0
    """Memory for keys and values on a CPU, GiB; a GPU goes by gpu_memory_utilization."""
    gpu_memory_utilization: float = 0.45
    """Share of a GPU's memory that an engine may take."""
    enforce_eager: bool = True
    """Run without compiling the model: starts much faster, answers slower on large models."""
    tool_call_parser: str | None = None
    """vLLM's parser for the model's tool calls; names one to let agents pass `tools`."""
    chat_template: str | None = None
    """A chat template file to use in place of the model's own."""
    host: str = "127.0.0.1"
    """Address the engines listen on. Other nodes reach an engine only on another than loopback."""
    num_threads: int = 2
    """Processor threads of one engine on a CPU."""
    num_cpus: float = 1.0
    """Processors that Ray sets aside for one engine."""
    num_gpus: float = 0.0
    """GPUs that Ray sets aside for one engine."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have for an engine to be placed there (Ray's label selectors)."""
    start_timeout_s: float = 300.0
    """Longest that an engine may take to load and answer, seconds."""
    update_timeout_s: float = 120.0
    """Longest that calls in flight and the new weights together may take at an update, seconds."""
    seed: int = 0
    """Seed of the engines' sampling."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further vLLM engine arguments by their Python names."""


def check_inference(config: InferenceConfig) -> None:
    """Raises UserError for values that no engine can run with."""
    for name in ("num_engines", "max_model_len", "max_num_seqs", "num_threads"):
        if getattr(config, name) < 1:
            raise UserError(f"inference.{name}={getattr(config, name)}: must be at least 1")
    if config.kv_cache_gib <= 0:
        raise UserError(f"inference.kv_cache_gib={config.kv_cache_gib}: must be above 0")
    if config.dtype not in DTYPES:
        raise UserError(f"inference.dtype={config.dtype}: must be one of {', '.join(DTYPES)}")
