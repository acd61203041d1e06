"""lightning-ray doctor: what would a trainer see of this agent, and what is missing?

    lightning-ray doctor -- python my_agent.py
    lightning-ray doctor tasks=tasks.jsonl count=3 -- python my_agent.py "{question}"
    lightning-ray doctor tasks=t.jsonl grader=g.py:grade -- python my_agent.py "{question}"

Exit status 0 when a trainer can learn from the agent, 3 when something is missing, 2 for mistakes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_ray.agents import Task, check_agent, load_tasks
from lightning_ray.agents.command import fill_command
from lightning_ray.cluster import Connection
from lightning_ray.doctor import Doctor, DoctorConfig, Report, check_doctor
from lightning_ray.doctor.ungraded import SPEC as UNGRADED
from lightning_ray.errors import UserError
from lightning_ray.gateway import choose_port
from lightning_ray.jobs.compose import compose_config
from lightning_ray.policies.models import resolve_model
from lightning_ray.tracking import Progress, write_json

NOT_TRAINABLE = 3


def main(arguments: Sequence[str]) -> None:
    """Examines one agent and prints the report. Raises UserError for what the user can mend."""
    config, overrides = configure(arguments)
    tasks = _tasks(config)
    check_agent(config.agent, tasks)
    choose_port(config.gateway)
    report = _examine(config, tasks, overrides)
    print(report.text(), end="")
    if config.json is not None:
        write_json(Path(config.json), report.as_json())
    if not report.trainable:
        sys.exit(NOT_TRAINABLE)


def configure(arguments: Sequence[str]) -> tuple[DoctorConfig, list[str]]:
    """The check's configuration, the agent's command in it, and the settings that were typed."""
    if "--" not in arguments:
        raise UserError("no agent: write its command after --, as in `doctor -- python agent.py`")
    place = list(arguments).index("--")
    overrides, command = _plain(arguments[:place]), list(arguments[place + 1 :])
    if not command:
        raise UserError("no command after --; write the agent's own, as in -- python agent.py")
    config: DoctorConfig = compose_config("doctor", DoctorConfig, overrides)
    check_doctor(config)
    config.agent.command = command
    config.agent.grader = config.grader or UNGRADED
    if config.json is not None and not Path(config.json).absolute().parent.is_dir():
        raise UserError(f"json={config.json}: no such folder; name a file in one that exists")
    return config, overrides


def _examine(config: DoctorConfig, tasks: Sequence[Task], overrides: Sequence[str]) -> Report:
    base = resolve_model(config.policy.model)
    # One step: what is shown are the phases.
    with Progress(1, title="doctor", mode=config.tracking.panel) as progress:
        connection = Connection(config.cluster)
        try:
            with progress.phase("starting Ray", slow=True):
                connection.__enter__()
            with Doctor(config, base, progress, own_cluster=True) as doctor:
                return doctor.examine(config.agent, tasks, overrides)
        finally:
            connection.close()


def _tasks(config: DoctorConfig) -> list[Task]:
    if config.tasks is not None:
        return load_tasks(config.tasks)[: config.count]
    task = Task("task", {})
    try:
        fill_command(config.agent.command, task)
    except UserError as error:
        raise UserError(f"{error}; or name a file of tasks: tasks=FILE") from error
    return [task]


def _plain(words: Sequence[str]) -> list[str]:
    """`--json FILE` and `--json=FILE` as the setting that they are."""
    rest = iter(words)
    plain = []
    for word in rest:
        if word == "--json":
            file = next(rest, None)
            if file is None:
                raise UserError("--json: name the file to write the report to")
            word = f"json={file}"
        plain.append(f"json={word[7:]}" if word.startswith("--json=") else word)
    return plain
