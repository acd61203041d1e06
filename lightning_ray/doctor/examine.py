"""Examining agents on the real parts: Ray, store, queue, one engine, gateway, workers; no learner.

Invariant: an agent runs as it would in training. Its base URL leads through the tap to the door,
its environment holds what `AgentConfig` lists and nothing else, its workers are the workers.
"""

import asyncio
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import ray

from lightning_ray.agents import AgentConfig, Task, attempt_environment
from lightning_ray.doctor.asking import check_asking, models_asked
from lightning_ray.doctor.config import DoctorConfig
from lightning_ray.doctor.elsewhere import hosts_asked
from lightning_ray.doctor.evidence import Evidence, runs_of
from lightning_ray.doctor.experiment import experiment_yaml, train_command
from lightning_ray.doctor.finding import Report
from lightning_ray.doctor.learning import check_learning
from lightning_ray.doctor.running import check_running
from lightning_ray.doctor.tap import Tap
from lightning_ray.doctor.ungraded import SPEC as UNGRADED
from lightning_ray.errors import InfrastructureError
from lightning_ray.policies.adapters import model_folder
from lightning_ray.rollouts import RolloutSpec, WorkerGroup
from lightning_ray.tracking import Progress
from lightning_ray.training import Parts, RunFolder

_RESOLVE_S = 10.0
_SLACK_S = 30.0


class Doctor:
    """The parts, started once, and any number of agents examined one after the other.

    A context manager; Ray must be up. Its spans lie in a folder that is removed at the end.
    """

    def __init__(
        self, config: DoctorConfig, base: Path, progress: Progress, own_cluster: bool = False
    ):
        """`base` is the folder of the model that answers the agents.

        With `own_cluster` the parts are left to the end of the cluster, which is the caller's next
        step.
        """
        self._config = config
        self._base = base
        self._progress = progress
        self._own_cluster = own_cluster
        self._stack = ExitStack()
        self._template = chat_template(model_folder(base), config.inference.chat_template)

    def __enter__(self) -> "Doctor":
        """Starts the parts. Raises what `Parts.start` raises."""
        try:
            folder = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="lr-doctor-", ignore_cleanup_errors=True)
            )
            self._parts = Parts(
                self._config, RunFolder(Path(folder) / "doctor"), self._base, self._progress
            )
            if not self._own_cluster:
                self._stack.callback(self._parts.stop)
            self._parts.start(learn=False, work=False)
            self._tap = self._stack.enter_context(
                Tap(
                    self._parts.url,
                    self._config.gateway.models,
                    self._resolve,
                    self._config.gateway.host,
                    self._config.gateway.call_timeout_s,
                )
            )
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def examine(
        self, agent: AgentConfig, tasks: Sequence[Task], overrides: Sequence[str] = ()
    ) -> Report:
        """Runs the agent on each task `config.samples` times and judges what was seen.

        `agent` must have passed `check_agent`; its grader is the one to try, or UNGRADED.
        `overrides` are the settings that were typed, for the command that would train the agent.
        Raises InfrastructureError when a part fails or the runs do not come to an end.
        """
        graded = agent.grader != UNGRADED
        settled = _settled(agent)
        attempts = self._run(settled, tasks)
        seen = Evidence(
            agent=settled,
            runs=(),
            exchanges=self._tap.exchanges(attempts),
            spans=self._parts.store.get(attempts),
            graded=graded,
            given=list(attempt_environment("http://127.0.0.1", "key")),
            left_behind=left_behind(self._tap.url),
            ours=frozenset(os.environ),
            chat_template=self._template,
            max_model_len=self._config.inference.max_model_len,
            cores=os.cpu_count() or 1,
        )
        seen = replace(seen, runs=runs_of(seen.spans, settled.graded_exit_codes))
        if not seen.exchanges:
            with self._progress.phase("no call arrived: looking where it goes", slow=True):
                # A base URL of nobody: what it would answer does not matter any more.
                env = attempt_environment(f"{self._tap.url}/a/nobody", "lightning-ray")
                seen = replace(seen, hosts=asyncio.run(hosts_asked(settled, tasks[0], env)))
        return Report(
            command=list(agent.command),
            runs=len(seen.runs),
            findings=[*check_running(seen), *check_asking(seen), *check_learning(seen)],
            experiment=experiment_yaml(
                agent,
                models_asked(seen) or self._config.gateway.models,
                self._config.tasks,
                agent.grader if graded else None,
            ),
            train_command=train_command(overrides),
        )

    def _run(self, agent: AgentConfig, tasks: Sequence[Task]) -> list[str]:
        """Runs the agent; returns the ids of the attempts."""
        config, queue = self._config, self._parts.queue
        prefix = f"{agent.name}-{secrets.token_hex(2)}"
        specs = [
            RolloutSpec(
                f"{prefix}-{place}-{sample}",
                task.id,
                task.data,
                agent.timeout_s,
                # A retry would hide what went wrong.
                max_attempts=1,
                max_faults=0,
                group_id=task.id,
            )
            for place, task in enumerate(tasks)
            for sample in range(config.samples)
        ]
        workers = WorkerGroup(config.rollouts, agent, queue, self._parts.store, self._tap.url)
        try:
            with self._progress.phase(f"running the agent {len(specs)} times", slow=True):
                queue.enqueue(specs)
                slots = config.rollouts.num_workers * config.rollouts.slots_per_worker
                rounds = -(-len(specs) // slots)
                limit = rounds * (agent.timeout_s + agent.grader_timeout_s)
                limit += config.rollouts.grace_s + _SLACK_S
                records = queue.wait([spec.rollout_id for spec in specs], limit)
            if len(records) < len(specs):
                lost = len(specs) - len(records)
                raise InfrastructureError(
                    f"{lost} of {len(specs)} runs did not come to an end within {limit:.0f} s"
                )
        finally:
            workers.stop()
        return [record.attempt_id for record in records]

    def _resolve(self, capability: str) -> str | None:
        known = self._parts.queue.actor.resolve.remote(capability)
        try:
            identity = ray.get(known, timeout=_RESOLVE_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise InfrastructureError(
                f"the rollout queue did not say whose call: {error}"
            ) from None
        return None if identity is None else identity.attempt_id


def left_behind(url: str) -> list[str]:
    """Processes of this machine whose environment names `url`: their attempts are over."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            names = any(value.startswith(f"{url}/") for value in process.environ().values())
        except (psutil.Error, OSError):
            continue  # Ended meanwhile, or somebody else's.
        if names and process.pid != os.getpid():
            found.append(f"{process.info['name']} (pid {process.pid})")
    return found


def chat_template(model: Path, file: str | None) -> str | None:
    """The text of the chat template in force; None where the model folder does not show it."""
    for path in (Path(file) if file else None, model / "chat_template.jinja"):
        if path is not None and path.is_file():
            return path.read_text(encoding="utf-8")
    config = model / "tokenizer_config.json"
    if not config.is_file():
        return None
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    return found if isinstance(found, str) or found is None else json.dumps(found)


def _settled(agent: AgentConfig) -> AgentConfig:
    """With absolute paths: workers run in folders of their own."""
    file, colon, function = agent.grader.rpartition(":")
    grader = f"{Path(file).absolute()}:{function}" if colon and file.endswith(".py") else None
    return replace(agent, cwd=str(Path(agent.cwd or ".").absolute()), grader=grader or agent.grader)
