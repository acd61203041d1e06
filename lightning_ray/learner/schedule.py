"""How the learning rate goes on, as a function of the step alone: a resumed run needs no more."""

import math
from typing import Any

from lightning_ray.learner.config import RATE, LearnerConfig


def learning_rate(config: LearnerConfig, step: int) -> float:
    """The learning rate of a step.

    With W = warmup_steps, S = schedule_steps, f = final_rate and t = (step - W) / (S - W), cut to
    0..1, it is `learning_rate` times

        step / W                                    while step <= W
        1                                           constant
        1 - (1 - f) t                               linear
        f + (1 - f) (1 + cos(pi t)) / 2             cosine (Loshchilov and Hutter, arXiv:1608.03983)

    Args:
        step: from 1.
    """
    warmup, final = config.warmup_steps, config.final_rate
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "constant":
        return config.learning_rate
    passed = min(1.0, (step - warmup) / (config.schedule_steps - warmup))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - (1.0 - final) * passed)
    return config.learning_rate * (final + (1.0 - final) * (1.0 + math.cos(math.pi * passed)) / 2)


def set_rate(optimizer: Any, rate: float) -> None:
    """Has a policy learn at this rate from now on, and its critic at so much of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE]
