"""Inference: the vLLM actor group that answers agents and records every call where it is sampled.

Owns the engines, the recording of calls, and taking on new weights; it is the only room that
touches vLLM's internals (`vllm_internals.py`). It must not know rollouts or rewards.
"""

from lightning_ray.inference.attribution import Attribution, attribution_headers
from lightning_ray.inference.config import InferenceConfig, check_inference
from lightning_ray.inference.engine import EngineState
from lightning_ray.inference.group import InferenceGroup
from lightning_ray.inference.sampling import (
    SamplingConfig,
    check_sampling,
    settled,
    what_is_set,
)

__all__ = [
    "Attribution",
    "EngineState",
    "InferenceConfig",
    "InferenceGroup",
    "SamplingConfig",
    "attribution_headers",
    "check_inference",
    "check_sampling",
    "settled",
    "what_is_set",
]
