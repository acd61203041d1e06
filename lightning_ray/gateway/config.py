"""Configuration of the gateway (Hydra group `gateway`)."""

from dataclasses import dataclass, field

from lightning_ray.errors import UserError
from lightning_ray.spans.limits import TelemetryLimits, check_telemetry


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
    engine_wait_s: float = 120.0
    """How long a call waits for an engine to come back when none can be reached, seconds; part of
    `call_timeout_s`."""
    max_calls: int = 4096
    """Calls that a replica answers at a time; one more is asked to come again."""
    max_calls_per_attempt: int = 256
    """Calls of one attempt at a time."""
    replay_mib: int = 64
    """Replies that a replica keeps for retries of their calls, MiB; 0 answers each retry anew."""
    telemetry: TelemetryLimits = field(default_factory=TelemetryLimits)
    """What one request of telemetry may hold."""


@dataclass
class ServingConfig:
    """Live traffic: callers with keys, conversations, released versions."""

    keys: dict[str, str] = field(default_factory=dict)
    """Callers by name, each with the environment variable that holds its key."""
    recorders: list[str] = field(default_factory=list)
    """Callers among them that may send model calls of engines of their own, with tokens."""
    conversation_header: str = "x-conversation-id"
    """Request header that tells a caller's conversations apart; without it, how they begin does."""
    conversation_idle_s: float = 1800.0
    """A conversation without a call for so long is over, seconds."""
    max_calls_per_key: int = 1024
    """Calls of one caller at a time."""
    max_engines: int = 2
    """Versions of one policy that have engines at the same time: champion, candidate, earlier."""
    poll_s: float = 0.25
    """How often the registry is asked where the releases stand, seconds."""


def check_serving(config: ServingConfig) -> None:
    """Raises UserError for values that nobody can be served with."""
    if not config.keys:
        raise UserError(
            "serving.keys is empty: name a caller and the environment variable with its key, "
            "+serving.keys.web=WEB_API_KEY"
        )
    if unknown := [name for name in config.recorders if name not in config.keys]:
        raise UserError(
            f"serving.recorders: {unknown[0]!r} is no caller of serving.keys, which are: "
            + ", ".join(config.keys)
        )
    if config.max_engines < 2:
        raise UserError(
            f"serving.max_engines={config.max_engines}: champion and candidate need one each, so "
            "at least 2"
        )
    if config.max_calls_per_key < 1:
        raise UserError(f"serving.max_calls_per_key={config.max_calls_per_key}: must be at least 1")
    for name in ("conversation_idle_s", "poll_s"):
        if getattr(config, name) <= 0:
            raise UserError(f"serving.{name}={getattr(config, name)}: must be above 0 seconds")


def check_gateway(config: GatewayConfig) -> None:
    """Raises UserError for values that no gateway can run with."""
    if not 0 <= config.port < 65536:
        raise UserError(f"gateway.port={config.port}: must be 0 (any free port) to 65535")
    if config.num_replicas < 1:
        raise UserError(f"gateway.num_replicas={config.num_replicas}: must be at least 1")
    if not config.models and not config.roles:
        raise UserError("gateway.models is empty: list the model names that the agent asks for")
    for name in ("max_calls", "max_calls_per_attempt"):
        if getattr(config, name) < 1:
            raise UserError(f"gateway.{name}={getattr(config, name)}: must be at least 1")
    if config.replay_mib < 0:
        raise UserError(f"gateway.replay_mib={config.replay_mib}: must be 0 or more")
    if config.engine_wait_s < 0:
        raise UserError(f"gateway.engine_wait_s={config.engine_wait_s}: must be 0 seconds or more")
    if config.call_timeout_s <= 0 or config.max_body_bytes < 1:
        raise UserError("gateway.call_timeout_s and gateway.max_body_bytes must be above 0")
    check_telemetry(config.telemetry)
