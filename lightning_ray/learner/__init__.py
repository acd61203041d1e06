"""Learner: the DeepSpeed actor group that turns batches of sequences into better weights.

Owns packing shared prefixes, the forward and backward pass, optimiser state, checkpoints and
publishing weights as a model folder. The only room that touches DeepSpeed, and only inside its
actors: importing this package imports neither torch nor DeepSpeed. It must not know where batches
come from or who serves the weights.
"""

from lightning_ray.learner.config import LearnerConfig, check_learner, check_model_dir
from lightning_ray.learner.group import LearnerGroup
from lightning_ray.learner.report import StepReport

__all__ = [
    "LearnerConfig",
    "LearnerGroup",
    "StepReport",
    "check_learner",
    "check_model_dir",
]
