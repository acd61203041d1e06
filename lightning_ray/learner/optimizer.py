"""The optimiser: AdamW, which without ZeRO looks at the gradient before it uses it.

With ZeRO DeepSpeed's own wrapper finds a gradient that is not finite, and clips. Without it there
is no such wrapper; DeepSpeed's engine reads what one would have left behind from this.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_ray.learner.config import RATE, LearnerConfig

VALUE_HEAD = "value_head."


def make_optimizer(config: LearnerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what of a module has a gradient; a group says how fast it learns (RATE)."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    policy = [one for name, one in named if not name.startswith(VALUE_HEAD)]
    critic = [one for name, one in named if name.startswith(VALUE_HEAD)]
    trained: list[dict[str, Any]] = [{"params": policy, RATE: 1.0}]
    if critic:
        trained.append({"params": critic, RATE: config.critic_rate})
    if config.zero_stage:
        return torch.optim.AdamW(trained, **settings)
    return GuardedAdamW(trained, config.max_grad_norm, **settings)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient, and leaves the weights alone where it is not finite."""

    def __init__(self, parameters: list[dict[str, Any]], max_norm: float, **settings: Any):
        """`max_norm` is the norm that gradients are scaled down to; 0 turns clipping off."""
        super().__init__(parameters, **settings)
        self._max_norm = max_norm
        self._global_grad_norm = 0.0
        self.overflow = False

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step on the gradients as they are, unless one is not finite."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm or float("inf"))
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        return None if self.overflow else super().step(closure)
