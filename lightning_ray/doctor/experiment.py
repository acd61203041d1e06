"""The experiment that would train an examined agent, ready to be written to a file."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from enum import StrEnum
from typing import Any

import yaml

from lightning_ray.agents import AgentConfig
from lightning_ray.cluster.plain_yaml import PlainDumper

GRADER = "my_grader.py:grade"
TASKS = "my_tasks.jsonl"
# Written in any case, whatever they are.
_ALWAYS = ("name", "command", "grader")
# Set by the experiment itself, or of the check alone.
_OWN = ("agent.", "tasks=", "count=", "samples=", "grader=", "json=", "gateway.models=")


def experiment_yaml(
    agent: AgentConfig, models: Sequence[str], tasks: str | None, grader: str | None
) -> str:
    """A file for the group `experiment`. What nobody named yet has a placeholder and a comment."""
    default = AgentConfig()
    described: dict[str, Any] = {"name": agent.name, "command": list(agent.command)}
    for field in fields(AgentConfig):
        value = getattr(agent, field.name)
        if field.name not in _ALWAYS and value != getattr(default, field.name):
            described[field.name] = str(value) if isinstance(value, StrEnum) else value
    described["grader"] = grader or GRADER
    text = yaml.dump(
        {
            "name": agent.name,
            "agent": _literal(described),
            "gateway": {"models": _literal(list(models))},
            "training": {"tasks": _literal(tasks or TASKS)},
        },
        Dumper=PlainDumper,
        sort_keys=False,
        default_flow_style=None,
        width=88,
        allow_unicode=True,
    )
    lines = ["# @package _global_"]
    if grader is None:
        lines.append(f"# {GRADER}: the function that judges a run (docs/agents.md)")
    if tasks is None:
        lines.append(f"# {TASKS}: one JSON object a line, whose fields the command takes in braces")
    return "\n".join([*lines, text])


def train_command(overrides: Sequence[str]) -> str:
    """What to type, with the settings that the check was given and the experiment does not hold."""
    rest = [word for word in overrides if not word.lstrip("+").startswith(_OWN)]
    words = " ".join(shlex.quote(word) for word in rest)
    return (
        'lightning-ray train "hydra.searchpath=[file://$PWD/conf]" experiment=mine ' + words
    ).strip()


def _literal(value: Any) -> Any:
    """The same value, with nothing in it that Hydra would read as an interpolation."""
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, str) and "${" in value:
        # A backslash escapes the dollar, and each one before it has to be escaped in turn.
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
