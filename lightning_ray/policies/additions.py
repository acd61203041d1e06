"""Low-rank additions to a model's matrices, as they travel: the small factors, and not the model.

LoRA (Hu et al., 2021, arXiv:2106.09685): W becomes W + scale B A, with W [out, in], B [out, rank]
and A [rank, in]. Whoever has W needs only A and B of a new version.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from lightning_ray.errors import InfrastructureError

if TYPE_CHECKING:
    from torch import Tensor

_DOWN, _UP = ".lora_A", ".lora_B"


def factors(weight: str) -> tuple[str, str]:
    """What the factors A and B of a weight's addition are called on their way."""
    return weight + _DOWN, weight + _UP


def factor_parts(factor: str) -> tuple[str, int]:
    """The weight whose addition a factor is part of, and which one it is: 0 is A, 1 is B."""
    weight, _, kind = factor.rpartition(".")
    return weight, (_DOWN, _UP).index(f".{kind}")


def weight_of(factor: str) -> str:
    """The weight whose addition a factor is part of."""
    return factor_parts(factor)[0]


def with_addition(weight: "Tensor", down: "Tensor", up: "Tensor", scale: float) -> "Tensor":
    """`weight` + `scale` `up` @ `down`, computed in float32, of the weight's type."""
    added: Tensor = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
    return added


def with_additions(
    weights: Iterable[tuple[str, "Tensor"]], additions: Mapping[str, "Tensor"], scale: float
) -> Iterator[tuple[str, "Tensor"]]:
    """A base model's weights in the additions' type, those that have an addition with it.

    `additions` are named as by `factors`, and all of one type; the sums are made where they are.
    Raises InfrastructureError, at the end, when one belongs to no weight.
    """
    left = set(additions)
    dtype = next(iter(additions.values())).dtype if additions else None
    for name, weight in weights:
        below, above = factors(name)
        if below in left and above in left:
            left -= {below, above}
            down, up = additions[below], additions[above]
            yield name, with_addition(weight.to(down), down, up, scale)
        else:
            yield name, weight.to(dtype) if weight.is_floating_point() else weight
    if left:
        raise InfrastructureError(f"additions to weights that the base does not have: {min(left)}")
