"""Launching an unmodified agent: its command, its environment, its end, and its grader.

Owns how a task becomes a process and how that process is watched, bounded and cleared away. Knows
nothing of tokens or training: what an agent said to a model is seen by others, through the base URL
that its environment names.
"""

from lightning_ray.agents.choice import check_agent, make_launcher
from lightning_ray.agents.config import AgentConfig, ResultBy, ServiceConfig, TaskBy
from lightning_ray.agents.environment import attempt_environment
from lightning_ray.agents.grader import Grader, GraderError, grade, load_grader
from lightning_ray.agents.launch import CommandLauncher, Launcher
from lightning_ray.agents.result import AgentEnd, AgentResult
from lightning_ray.agents.task import Task, load_tasks
from lightning_ray.agents.warm import WarmLauncher

__all__ = [
    "AgentConfig",
    "AgentEnd",
    "AgentResult",
    "CommandLauncher",
    "Grader",
    "GraderError",
    "Launcher",
    "ResultBy",
    "ServiceConfig",
    "Task",
    "TaskBy",
    "WarmLauncher",
    "attempt_environment",
    "check_agent",
    "grade",
    "load_grader",
    "load_tasks",
    "make_launcher",
]
