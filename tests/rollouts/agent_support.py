"""An agent in a folder, whose attempts are all worth 1."""

from pathlib import Path
from typing import Any

from lightning_ray.agents import AgentConfig

SLEEPS = "import sys, time\ntime.sleep(float(sys.argv[1]))\nprint('done')\n"
"""For so many seconds as its task says."""


def agent_in(folder: Path, text: str, *words: str, **settings: Any) -> AgentConfig:
    """Writes the agent and its grader; it is started with these words after its name."""
    (folder / "agent.py").write_text(text)
    (folder / "grader.py").write_text("def grade(task, result, spans):\n    return 1.0\n")
    return AgentConfig(
        name="test",
        command=["python", "agent.py", *words],
        cwd=str(folder),
        grader=f"{folder}/grader.py:grade",
        **settings,
    )
