"""The running parts of a job: started in an order that overlaps their waits, stopped in reverse."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import ray
from ray.actor import ActorHandle

from lightning_ray.cluster import Needs
from lightning_ray.errors import LightningRayError
from lightning_ray.gateway import (
    Answerer,
    Role,
    choose_port,
    make_roles,
    models_of,
    start_gateway,
    stop_gateway,
    upstream_answerer,
)
from lightning_ray.inference import InferenceGroup
from lightning_ray.learner import LearnerGroup
from lightning_ray.policies.models import resolve_model
from lightning_ray.rollouts import QueueClient, WorkerGroup, start_queue
from lightning_ray.spans import SpanClient, start_store
from lightning_ray.tracking import Progress
from lightning_ray.training.batch_maker import start_batch_maker
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.folder import RunFolder

log = logging.getLogger(__name__)


def needs_of(config: TrainConfig, learn: bool = True) -> Needs:
    """What the parts of a job ask Ray for."""
    inference, learner, rollouts = config.inference, config.learner, config.rollouts
    ours = [policy for policy in config.policies.values() if not policy.is_upstream]
    engines = inference.num_engines * (len(ours) if config.policies else 1)
    ranks = learner.num_ranks if learn else 0
    return Needs(
        cpus=engines * inference.num_cpus
        + ranks * learner.num_cpus
        + rollouts.num_workers * rollouts.num_cpus
        + config.gateway.num_replicas * config.gateway.num_cpus,
        gpus=engines * inference.num_gpus + ranks * learner.num_gpus,
    )


class Parts:
    """Store, queue, engines, learner, gateway and workers of one job; a context manager."""

    store: SpanClient
    queue: QueueClient
    engines: InferenceGroup
    """Of the trained policy; none where somebody else's API answers for it."""
    frozen: dict[str, InferenceGroup]
    """Engines of the policies that stay as they are; one with an upstream has none."""
    learner: LearnerGroup
    batches: ActorHandle
    """Builds a step's batch (`BatchMaker`)."""
    workers: WorkerGroup
    url: str
    """The gateway's base URL, "http://HOST:PORT"."""

    def __init__(self, config: TrainConfig, folder: RunFolder, base: Path, progress: Progress):
        """`base` is the folder of the base model; Ray must be up."""
        self._config = config
        self._folder = folder
        self._base = base
        self._progress = progress
        self._stack = ExitStack()
        self.frozen = {}
        self._held = False

    def start(self, model: Path, version: int, learn: bool = True, work: bool = True) -> None:
        """Starts everything; the engines answer with version `version`, whose weights are `model`.

        Without `learn` there is no learner: for jobs that only run the agent; without `work` no
        workers, for a job that starts its own. Where every policy has an upstream and nothing
        learns, no engine starts either, and `model` is not read.

        Raises InfrastructureError when a part does not start, UserError when the user can mend it.
        """
        config = self._config
        port = choose_port(config.gateway)
        trained = config.policy.name
        roles = make_roles(config.gateway, trained, list(config.policies) or [trained])
        others = {n: policy for n, policy in config.policies.items() if n != trained}
        upstreams = [p for p in (config.policy, *others.values()) if p.is_upstream]
        answerers = [upstream_answerer(policy) for policy in upstreams]
        models = {n: resolve_model(p.model) for n, p in others.items() if not p.is_upstream}
        self.store = start_store(str(self._folder.spans), config.spans)
        self._at_end(self.store.close)
        self.queue = start_queue(
            self._folder.run_id, config.rollouts, self._folder.path / "rollouts", self.store
        )
        if learn or models or not config.policy.is_upstream:
            answerers += self._start_models(model, version, models, roles, learn)
        with self._progress.phase("starting the gateway and the rollout workers", slow=True):
            self._at_end(stop_gateway)
            self.url = start_gateway(
                config.gateway, port, self.queue.actor, roles, answerers, self.store
            )
            if work:
                self.workers = WorkerGroup(
                    config.rollouts, config.agent, self.queue, self.store, self.url
                )
                self._at_end(self.workers.stop)

    def _start_models(
        self,
        model: Path,
        version: int,
        models: Mapping[str, Path],
        roles: Sequence[Role],
        learn: bool,
    ) -> list[Answerer]:
        """Starts the engines and the learner; returns who answers once all of them do."""
        config = self._config
        trained = config.policy.name
        learner = " and the DeepSpeed learner" if learn else ""
        with self._progress.phase(f"starting the vLLM engine{learner}", slow=True):
            groups = {}
            # The engines' slow start runs while the learner's is waited for.
            if not config.policy.is_upstream:
                self.engines = self._engines(model, trained, models_of(roles, trained), version)
                groups[trained] = self.engines
            self.frozen = {
                name: self._engines(folder, name, models_of(roles, name), 0)
                for name, folder in models.items()
            }
            if learn:
                self.batches = start_batch_maker()
                self._at_end(partial(ray.kill, self.batches))
                self._start_learner()
            groups |= self.frozen
            return [Answerer(n, tuple(g.wait_ready()), g.key) for n, g in groups.items()]

    def _engines(
        self, model: Path, policy: str, names: Sequence[str], version: int
    ) -> InferenceGroup:
        """The engines of one policy, starting."""
        group = InferenceGroup(
            self._config.inference, str(model), policy, names, version, self.store
        )
        self._at_end(group.stop)
        return group

    def mend(self) -> list[str]:
        """Replaces what has died and can be replaced while the run goes on; says what, a line each.

        Raises InfrastructureError when an engine does not come back.
        """
        lines = []
        if died := self.workers.mend():
            lines.append(f"{died} rollout workers died and were replaced")
        groups = {**self.frozen}
        if not self._config.policy.is_upstream:
            groups[self._config.policy.name] = self.engines
        for name, group in groups.items():
            if died := group.mend():
                lines.append(f"{died} engines of {name} died and are being replaced")
        # What nobody can answer waits in the queue, and not in an agent whose time runs.
        if (silent := any(not group.alive for group in groups.values())) != self._held:
            self.queue.hold(silent)
            self._held = silent
        return lines

    def start_learner(self) -> None:
        """Starts the learner alone: for a job that learns from what is there and runs no agent."""
        with self._progress.phase("starting the DeepSpeed learner", slow=True):
            self._start_learner()

    def replace_learner(self) -> None:
        """Another learner in place of one that died; it has the base model's weights.

        Raises InfrastructureError when it does not start.
        """
        self.learner.stop()
        with self._progress.phase("starting the DeepSpeed learner again", slow=True):
            self._start_learner()

    def stop(self) -> None:
        """Stops every part that was started, last first; one that fails does not keep the rest."""
        self._stack.close()

    def _start_learner(self) -> None:
        self.learner = LearnerGroup(self._config.learner, self._base, self._folder.run_id)
        self._at_end(self.learner.stop)

    def _at_end(self, stop: Callable[[], None]) -> None:
        self._stack.callback(_stop_quietly, stop)


def _stop_quietly(stop: Callable[[], None]) -> None:
    # A part that died already cannot be stopped; the cluster's end clears what is left.
    try:
        stop()
    except (ray.exceptions.RayError, LightningRayError, ValueError) as error:
        log.info("while stopping: %s", error)
