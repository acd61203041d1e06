"""Agents in folders of their own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.agents import AgentConfig


@pytest.fixture
def agent(tmp_path: Path) -> Callable[..., AgentConfig]:
    """Writes an agent's files into a folder of its own and returns its configuration."""

    def make(
        source: str, *arguments: str, files: Mapping[str, str] | None = None, **settings: Any
    ) -> AgentConfig:
        folder = tmp_path / "agent"
        folder.mkdir(exist_ok=True)
        for name, content in {"agent.py": source, **(files or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        settings.setdefault("command", ["python", "agent.py", *arguments])
        return AgentConfig(name="test", cwd=str(folder), grader="unused:unused", **settings)

    return make
