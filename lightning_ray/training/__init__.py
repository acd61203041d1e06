"""Training: the conductor, which decides who does what when.

Owns the order of tasks, the steps, the run's state and folder, checkpoints and resuming. It must
not know what happens inside a room: it calls what each room exports.
"""

from lightning_ray.training.conductor import Conductor
from lightning_ray.training.config import TrainConfig, TrainingConfig, check_train
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.parts import Parts, needs_of
from lightning_ray.training.state import RunState

__all__ = [
    "Conductor",
    "Parts",
    "RunFolder",
    "RunState",
    "TrainConfig",
    "TrainingConfig",
    "check_train",
    "needs_of",
]
