"""An algorithm of the user's own: found, made, and tried out before anything expensive starts.

Invariant: an algorithm that this module returns has what `base.Algorithm` asks for and has scored
made-up groups; its own loss, where it has one, is the same however a batch is cut. What the user
got wrong is a `UserError` of one line that names the file and the line.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_ray.algorithms.base import (
    Algorithm,
    Group,
    TokenLoss,
    describe,
    finish,
    own_loss,
    score,
)
from lightning_ray.algorithms.config import AlgorithmConfig, LossConfig, check_loss
from lightning_ray.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def load_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm of the class `config.name`, "module:Class", tried out.

    The module is found as Python finds modules, and in the folder where the command is typed.

    Raises:
        UserError: the class is not found or cannot be made; or see `try_out`.
    """
    algorithm = _make(_find(config.name), config)
    try_out(algorithm, config)
    return algorithm


def try_out(algorithm: Algorithm, config: AlgorithmConfig) -> None:
    """Score a few made-up groups, and run the algorithm's own loss on a few made-up tokens.

    Raises:
        UserError: something of the protocol is missing, raises, or gives what cannot be used.
    """
    name = config.name
    if not callable(getattr(algorithm, "score_group", None)):
        raise UserError(f"algorithm.name={name}: the class has no method score_group(group)")
    loss = getattr(algorithm, "loss", None)
    if not isinstance(loss, LossConfig):
        kind = "has no attribute" if loss is None else f"has a {type(loss).__name__} as its"
        raise UserError(
            f"algorithm.name={name}: the class {kind} `loss`; `self.loss = config.loss` takes what "
            "the configuration says, a LossConfig"
        )
    check_loss(loss)
    size = config.group_size
    tried = [
        np.linspace(0.0, 1.0, size),
        np.linspace(1.0, 0.0, max(size - 1, 1)),
        np.ones(size),
        np.zeros(1),
    ]
    groups = [Group("try-out", one, np.arange(1, len(one) + 1)) for one in tried]
    finish(algorithm, name, groups, [score(algorithm, name, group) for group in groups])
    own = own_loss(algorithm)
    if own is not None:
        if not callable(own):
            raise UserError(f"algorithm.name={name}: token_loss must be a method")
        _try_loss(own, name)


def _find(spec: str) -> Any:
    """What `spec` names. Raises UserError."""
    module_name, _, class_name = spec.partition(":")
    if not class_name.isidentifier() or not all(
        part.isidentifier() for part in module_name.split(".")
    ):
        raise UserError(
            f"algorithm.name={spec}: write module:Class, such as my_algorithm:MyAlgorithm for the "
            "class MyAlgorithm of my_algorithm.py"
        )
    here = os.getcwd()
    if here not in sys.path:
        # Last, so that no file of the user's takes the place of an installed module.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise UserError(
                f"algorithm.name={spec}: {module_name} does not import: {describe(error)}"
            ) from error
        raise UserError(
            f"algorithm.name={spec}: no module {module_name}, neither installed nor in {here}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"algorithm.name={spec}: {module_name} does not import: {describe(error)}"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        kind = "has no class" if found is None else f"has a {type(found).__name__}, not a class,"
        raise UserError(f"algorithm.name={spec}: {module.__file__} {kind} {class_name}")
    return found


def _make(kind: Any, config: AlgorithmConfig) -> Any:
    try:
        return kind(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"algorithm.name={config.name}: {kind.__name__}(config) raised {describe(error)}"
        ) from error


def _try_loss(loss: TokenLoss, name: str) -> None:
    """The loss of five tokens at once, in two parts, and of none. Raises UserError."""
    import torch

    new = torch.tensor([-0.1, -1.0, -2.0, -0.5, -3.0])
    old = torch.tensor([-0.2, -0.9, -2.0, -1.5, -0.5])
    credit = torch.tensor([1.0, -1.0, 0.5, -0.25, 2.0])

    def run(part: slice) -> "Tensor":
        logprobs = new[part].clone().requires_grad_()
        try:
            losses = loss(logprobs, old[part], credit[part])
        except Exception as error:
            raise UserError(
                f"algorithm.name={name}: token_loss raised {describe(error)}"
            ) from error
        shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        if shape != tuple(logprobs.shape):
            raise UserError(
                f"algorithm.name={name}: token_loss gave {shape} for {len(logprobs)} tokens; give "
                "one loss per token"
            )
        if not torch.isfinite(losses).all():
            raise UserError(f"algorithm.name={name}: token_loss gave {losses.tolist()}")
        return losses

    whole = run(slice(0, 5))
    if not whole.requires_grad:
        raise UserError(
            f"algorithm.name={name}: token_loss does not depend on logprobs, so nothing would be "
            "learnt"
        )
    parts = torch.cat([run(slice(0, 2)), run(slice(2, 5))])
    if not torch.allclose(whole, parts, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"algorithm.name={name}: token_loss gives a token another loss beside other tokens; "
            "it may depend on the token's own logprobs and credit alone"
        )
    run(slice(0, 0))
