"""What DeepSpeed is told: the environment of a rank, and the engine's settings."""

import logging
import os
from typing import Any

from lightning_ray.cluster.processor import multiplies_bfloat16
from lightning_ray.errors import UserError
from lightning_ray.learner.config import LearnerConfig


def resolved_dtype(config: LearnerConfig) -> str:
    """bf16 or fp32: what `learner.dtype` comes to on this node."""
    if config.dtype != "auto":
        return config.dtype
    return "bf16" if config.num_gpus > 0 or multiplies_bfloat16() else "fp32"


def require_possible(config: LearnerConfig) -> None:
    """Raises UserError for what DeepSpeed does not compute, once the type is known."""
    if config.dtype == "bf16" and config.zero_stage == 0:
        raise UserError(
            "learner.zero_stage=0 with bfloat16: DeepSpeed keeps float32 weights beside bfloat16 "
            "ones from stage 1 on; set learner.zero_stage=1 or learner.dtype=fp32"
        )


def set_environment(rank: int, num_ranks: int, host: str, port: int) -> None:
    """What DeepSpeed and torch.distributed read when they are imported or initialised."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        # Ray shows an actor only its own GPUs, so each rank is the first on what it can see.
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def on_gpu(config: LearnerConfig) -> bool:
    """Whether this rank computes on a GPU; DeepSpeed reads it when it is imported, after this.

    Raises UserError where it is to and PyTorch sees none.
    """
    import torch

    wanted = config.num_gpus > 0
    if wanted and not torch.cuda.is_available():
        raise UserError(
            f"learner.num_gpus={config.num_gpus:g}, and PyTorch sees no GPU; is it the CPU build? "
            "Set learner.num_gpus=0 to train on the CPU"
        )
    os.environ["DS_ACCELERATOR"] = "cuda" if wanted else "cpu"
    # What is compiled for a GPU is compiled by as many processes as the rank has threads.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(config.num_threads))
    return wanted


def settle_deepspeed(gpu: bool) -> None:
    """What is set in DeepSpeed itself, once it is imported."""
    import deepspeed

    # Its progress at start is of no use to a person who watches the run.
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not gpu:
        # Otherwise DeepSpeed compiles a shared-memory collective at the first start: a minute,
        # and a compiler that a user's machine need not have. Gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """DeepSpeed's settings. The optimiser is ours, so that nothing is compiled at start."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # A step has as many rows as the batch fills: `backward` only accumulates, `step` reduces.
        "managed_gradient_accumulation": False,
        # Without ZeRO the optimiser clips by itself (`optimizer`).
        "gradient_clipping": config.max_grad_norm if config.zero_stage else 0.0,
        "bf16": {"enabled": config.dtype == "bf16", "check_grad_overflow": True},
        # Sums over many rows and ranks lose small gradients in bfloat16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.zero_stage,
            # Nothing to overlap with on a CPU; the default bucket alone would take 2 GB.
            "overlap_comm": False,
            "reduce_bucket_size": 2**25,
            "allgather_bucket_size": 2**27,
            # Of stage 3: weights smaller than this stay whole on every rank.
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": 10**9,
    }
