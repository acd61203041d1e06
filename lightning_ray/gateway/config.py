"""Configuration of the gateway (Hydra group `gateway`)."""

from dataclasses import dataclass, field

from lightning_ray.errors import UserError


@dataclass
class RoleConfig:
    """One part that an agent's system plays, and which policy answers it."""

    policy: str = ""
    """Name of the policy; empty is the trained one."""
    model: str = ""
    """The model name that it asks for."""
    system: str | None = None
    """Regular expression found in its system prompt; tells apart roles that ask for one name."""
    headers: dict[str, str] = field(default_factory=dict)
    """Request headers that it sends, each with its exact value."""


@dataclass
class GatewayConfig:
    """The one HTTP door."""

    host: str = "127.0.0.1"
    """Address to listen on. Agents on other nodes need another than loopback."""
    port: int = 0
    """Port to listen on; 0 takes a free one."""
    num_replicas: int = 1
    """Replicas of the gateway."""
    num_cpus: float = 0.0
    """Processors that Ray sets aside for one replica."""
    models: list[str] = field(default_factory=lambda: ["gpt-4o-mini"])
    """Model names that agents ask for; each is answered by the trained policy."""
    roles: dict[str, RoleConfig] = field(default_factory=dict)
    """Roles by name, for agents that ask several policies; in place of `models`."""
    max_body_bytes: int = 16 * 1024 * 1024
    """Largest request body, bytes."""
    call_timeout_s: float = 300.0
    """Longest that one call may take, seconds."""


def check_gateway(config: GatewayConfig) -> None:
    """Raises UserError for values that no gateway can run with."""
    if not 0 <= config.port < 65536:
        raise UserError(f"gateway.port={config.port}: must be 0 (any free port) to 65535")
    if config.num_replicas < 1:
        raise UserError(f"gateway.num_replicas={config.num_replicas}: must be at least 1")
    if not config.models and not config.roles:
        raise UserError("gateway.models is empty: list the model names that the agent asks for")
    if config.call_timeout_s <= 0 or config.max_body_bytes < 1:
        raise UserError("gateway.call_timeout_s and gateway.max_body_bytes must be above 0")
