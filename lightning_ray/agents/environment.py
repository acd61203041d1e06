"""What an agent's environment holds: what is listed, and nothing else.

Invariant: a variable of ours reaches the agent only by name, in `inherit_env`. Our keys, Ray's
settings and the trainer's thread counts do not leak into rollouts.
"""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from lightning_ray.agents.config import AgentConfig
from lightning_ray.errors import UserError

REWARD_VARIABLE = "LIGHTNING_RAY_REWARD_URL"
"""Where an agent may post rewards of its own."""
_EXPORTER = "OTEL_EXPORTER_OTLP_"


def base_environment(
    config: AgentConfig, parent: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The part that all attempts share: the inherited variables, then the configured ones.

    Args:
        parent: Where to inherit from; None is this process's environment.
    """
    parent = os.environ if parent is None else parent
    inherited = {name: parent[name] for name in config.inherit_env if name in parent}
    return {**inherited, **{name: str(value) for name, value in config.env.items()}}


def merged_environment(base: Mapping[str, str], attempt: Mapping[str, str]) -> dict[str, str]:
    """What one attempt is started with: the shared part, and over it the attempt's own.

    An agent that is configured to export its telemetry elsewhere goes on doing so.
    """
    if any(name.startswith(_EXPORTER) for name in base):
        attempt = {name: value for name, value in attempt.items() if not name.startswith("OTEL_")}
    given = {name: value for name, value in base.items() if name.startswith("OTEL_")}
    return {**base, **attempt, **given}


def attempt_environment(
    base_url: str, api_key: str, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The part that is one attempt's own: where its model calls, telemetry and rewards go.

    Traces alone have somewhere to go, so exporters of metrics and logs are told to stay off.

    Args:
        base_url: An http(s) URL, with or without `/v1` at its end.
        api_key: What the clients are to send as their key; they refuse to start without one.
        extra: Further variables for this attempt.

    Raises:
        UserError: `base_url` is no http(s) URL.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"base URL {base_url!r} is not http(s)://HOST[:PORT]/PATH")
    root = base_url.rstrip("/").removesuffix("/v1")
    return {
        "OPENAI_BASE_URL": f"{root}/v1",
        "OPENAI_API_BASE": f"{root}/v1",
        "OPENAI_API_KEY": api_key,
        "ANTHROPIC_BASE_URL": root,
        "ANTHROPIC_API_KEY": api_key,
        "OTEL_EXPORTER_OTLP_ENDPOINT": root,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{root}/v1/traces",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        REWARD_VARIABLE: f"{root}/v1/rewards",
        **(extra or {}),
    }
