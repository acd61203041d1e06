"""What a checkpoint says of itself, read without torch and without loading weights."""

import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ray.errors import UserError
from lightning_ray.learner.config import LearnerConfig

STATE_FILE = "state.json"
"""In a checkpoint's folder: {"learner": what the group needs, "state": the caller's own}."""


def shape_of(config: LearnerConfig) -> dict[str, Any]:
    """The settings that a checkpoint can only be loaded with, by name."""
    return {
        "dtype": config.dtype,
        "zero_stage": config.zero_stage,
        "lora.rank": config.lora.rank,
        "lora.alpha": config.lora.alpha,
        "lora.targets": list(config.lora.targets),
        "critic": config.critic_rate > 0,
    }


def require_shape(folder: Path, saved: Mapping[str, Any], config: LearnerConfig) -> None:
    """Raises UserError when a checkpoint was saved with other settings of `shape_of`."""
    for name, here in shape_of(config).items():
        # An older one does not say all of them.
        there = saved.get(name, here)
        if there == here:
            continue
        if name == "critic":
            raise UserError(
                f"the checkpoint {folder} was saved {'with' if there else 'without'} a critic; "
                "algorithm.loss.critic.coefficient says whether there is one"
            )
        raise UserError(
            f"the checkpoint {folder} was saved with learner.{name}={there}; set that, it is {here}"
        )


def save_generators(folder: Path, rank: int) -> None:
    """Keeps this process's random generators in a checkpoint."""
    import torch

    generators = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    (folder / f"random-{rank}.pickle").write_bytes(pickle.dumps(generators))


def load_generators(folder: Path, rank: int, saved_ranks: int) -> None:
    """Goes on with the random generators that a rank kept; the file is one of our own.

    A rank more than the `saved_ranks` there were keeps those that it was set up with.
    """
    import torch

    if rank >= saved_ranks:
        return
    generators = pickle.loads((folder / f"random-{rank}.pickle").read_bytes())
    random.setstate(generators["python"])
    np.random.set_state(generators["numpy"])
    torch.set_rng_state(generators["torch"])
