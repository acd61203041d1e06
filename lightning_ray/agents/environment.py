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
TASK_VARIABLE = "LIGHTNING_RAY_TASK_FILE"
"""Where the task lies, with `agent.task_by=file`."""
RESULT_VARIABLE = "LIGHTNING_RAY_RESULT_FILE"
"""Where the result belongs, with `agent.result_by=file`."""
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


def named_variables(names: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The variables of an attempt under other names as well.

    Args:
        names: The other name of each, to its own: `agent.env_names`.
        own: What the attempt sets.

    Raises:
        UserError: the attempt sets no such variable.
    """
    for name, source in names.items():
        if source not in own:
            raise UserError(
                f"agent.env_names.{name}: an attempt sets no variable {source!r}; "
                f"it sets {', '.join(sorted(own))}"
            )
    return {name: own[source] for name, source in names.items()}


def check_names(config: AgentConfig) -> None:
    """Raises UserError for a name that no variable can have, or that is set in two ways."""
    for setting in ("env", "env_names", "task_env"):
        for name in getattr(config, setting):
            if not name or "=" in name or "\0" in name:
                raise UserError(f"agent.{setting}: {name!r} is no name for a variable; correct it")
    for name in config.task_env:
        if name in config.env_names:
            raise UserError(
                f"agent.task_env.{name}: agent.env_names sets it too; leave it out of one of them"
            )


def env_file(variables: Mapping[str, str]) -> str:
    """The variables as `docker run --env-file` reads them: NAME=VALUE, one a line.

    Raises:
        UserError: a value has a line break, which such a file cannot hold.
    """
    for name, value in variables.items():
        if "\n" in value or "\r" in value:
            raise UserError(
                f"agent.command: {{env_file}} cannot hold {name}, which has a line break; "
                "give it to the agent in another way, for example agent.task_by=stdin"
            )
    return "".join(f"{name}={value}\n" for name, value in variables.items())
