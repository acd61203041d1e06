"""What a run sets of how its rollouts' calls are sampled, over what their agents ask for."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_ray.errors import UserError


@dataclass
class SamplingConfig:
    """How calls are sampled; what is null is left to the agent."""

    temperature: float | None = None
    """0 takes the likeliest token each time."""
    top_p: float | None = None
    """Share of the probability that is drawn from, above 0 to 1."""
    top_k: int | None = None
    """Likeliest tokens that are drawn from; 0 is all. Engines of ours only."""
    max_tokens: int | None = None
    """Tokens that a call may sample at most; an agent may ask for fewer."""
    seed: int | None = None
    """Makes draws repeatable: a call's own seed comes from it, its attempt and its number there."""


def check_sampling(config: SamplingConfig, where: str) -> None:
    """Raises UserError for values that no call can be sampled with; `where` names the setting."""
    ranges = {
        "temperature": (0.0, math.inf, "0 or more"),
        "top_p": (math.nextafter(0, 1), 1.0, "above 0, at most 1"),
        "top_k": (0, math.inf, "0 or more"),
        "max_tokens": (1, math.inf, "at least 1"),
        "seed": (0, math.inf, "0 or more"),
    }
    for name, (least, most, words) in ranges.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise UserError(f"{where}.{name}={value}: must be {words}")


def what_is_set(config: SamplingConfig) -> dict[str, float]:
    """The settings that are not left to the agent, by name."""
    return {name: value for name, value in vars(config).items() if value is not None}


def seed_of(seed: int, attempt_id: str, number: int) -> int:
    """The seed of a call, 31 bits: the same in each repetition of a run, and no other call's."""
    name = f"{seed} {number} {attempt_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest()) & 0x7FFFFFFF


def settled(
    asked: Mapping[str, float | None], wanted: Mapping[str, float], attempt_id: str, number: int
) -> dict[str, float]:
    """What is to change in a call that asked for `asked`, under the same names.

    `number` counts the attempt's calls. Without `max_tokens` in `asked` the call has no limit yet.
    """
    changed = {name: wanted[name] for name in ("temperature", "top_p", "top_k") if name in wanted}
    if (most := wanted.get("max_tokens")) is not None:
        own = asked.get("max_tokens")
        changed["max_tokens"] = int(most if own is None else min(own, most))
    if (seed := wanted.get("seed")) is not None:
        changed["seed"] = seed_of(int(seed), attempt_id, number)
    return {name: value for name, value in changed.items() if asked.get(name) != value}
