"""Roles: which policy answers a call, told by the model name, a header, or the system prompt.

Invariant: the first role that matches answers, in the order of the configuration; a call that
matches none is refused with the names that there are, never answered by a guess.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ray.errors import UserError
from lightning_ray.gateway.config import GatewayConfig
from lightning_ray.gateway.system_prompt import system_prompt


@dataclass(frozen=True)
class Role:
    """One part that an agent's system plays."""

    name: str
    """What spans call it."""
    policy: str
    model: str
    """The model name that it asks for."""
    system: re.Pattern[str] | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def matches(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
        """Whether a request is this role's."""
        if body.get("model") != self.model:
            return False
        if any(headers.get(name) != value for name, value in self.headers):
            return False
        return self.system is None or bool(self.system.search(system_prompt(path, dict(body))))


def make_roles(config: GatewayConfig, trained: str, policies: Sequence[str]) -> tuple[Role, ...]:
    """The roles of a run whose trained policy is `trained`.

    Without `gateway.roles` every name of `gateway.models` is a role of the trained policy. Raises
    UserError for a role that cannot match or whose policy is not there.
    """
    if not config.roles:
        return tuple(Role(name, trained, name) for name in config.models)
    roles = []
    for name, role in config.roles.items():
        policy = role.policy or trained
        if policy not in policies:
            raise UserError(
                f"gateway.roles.{name}.policy={policy}: no such policy; there are: "
                f"{', '.join(policies)}"
            )
        if not role.model:
            raise UserError(f"gateway.roles.{name}.model: name the model that the role asks for")
        try:
            system = re.compile(role.system, re.DOTALL) if role.system else None
        except re.error as error:
            raise UserError(
                f"gateway.roles.{name}.system={role.system}: no regular expression ({error})"
            ) from error
        headers = tuple((key.lower(), value) for key, value in role.headers.items())
        roles.append(Role(name, policy, role.model, system, headers))
    for place, later in enumerate(roles):
        for earlier in roles[:place]:
            if earlier.model == later.model and earlier.system is None and not earlier.headers:
                raise UserError(
                    f"gateway.roles.{later.name} can never match: {earlier.name} comes first and "
                    f"takes every call for {later.model}; put it last, or give it a system pattern"
                )
    idle = [policy for policy in policies if all(made.policy != policy for made in roles)]
    if idle:
        raise UserError(
            f"no role in gateway.roles is answered by policy {idle[0]}; add one with "
            f"policy={idle[0]}, or take the policy away"
        )
    return tuple(roles)


def models_of(roles: Sequence[Role], policy: str) -> list[str]:
    """The model names under which a policy is asked for."""
    return list(dict.fromkeys(role.model for role in roles if role.policy == policy))


def describe(roles: Sequence[Role]) -> str:
    """The roles in words, for a message."""
    return "; ".join(
        f"{role.name} asks for {role.model}"
        + (f" with a system prompt like {role.system.pattern!r}" if role.system else "")
        + "".join(f" with header {name}: {value}" for name, value in role.headers)
        for role in roles
    )
