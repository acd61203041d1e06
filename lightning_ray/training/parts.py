"""The running parts of a job: started in an order that overlaps their waits, stopped in reverse."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import ray
from ray.actor import ActorHandle

from lightning_ray.cluster import Needs
from lightning_ray.errors import InfrastructureError, LightningRayError
from lightning_ray.gateway import (
    Answerer,
    Role,
    choose_port,
    door_url,
    make_roles,
    models_of,
    prepare_gateway,
    start_gateway,
    stop_gateway,
    upstream_answerer,
)
from lightning_ray.inference import InferenceGroup
from lightning_ray.learner import LearnerGroup
from lightning_ray.policies import PolicyConfig
from lightning_ray.policies.models import resolve_model
from lightning_ray.rollouts import QueueClient, WorkerGroup, start_queue
from lightning_ray.spans import SpanClient, start_store
from lightning_ray.tracking import Progress
from lightning_ray.training.batch_maker import start_batch_maker
from lightning_ray.training.config import TrainConfig, settings_of
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.restarts import Restarts
from lightning_ray.training.threads import meanwhile

log = logging.getLogger(__name__)

SERVE_S = 120.0
"""How long Ray Serve may take to start, or to close a door, seconds; it has limits of its own."""


def needs_of(config: TrainConfig, learn: bool = True) -> Needs:
    """What the parts of a job ask Ray for."""
    inference, rollouts = config.inference, config.rollouts
    ours = [policy for policy in _policies(config).values() if not policy.is_upstream]
    engines = inference.num_engines * len(ours)
    if learn and config.evaluation.every:
        engines += inference.num_engines * sum(policy.train for policy in ours)
    learners = [settings_of(config, policy).learner for policy in ours if policy.train and learn]
    return Needs(
        cpus=engines * inference.num_cpus
        + sum(learner.num_ranks * learner.num_cpus for learner in learners)
        + rollouts.num_workers * rollouts.num_cpus
        + config.gateway.num_replicas * config.gateway.num_cpus,
        gpus=engines * inference.num_gpus
        + sum(learner.num_ranks * learner.num_gpus for learner in learners),
    )


def _policies(config: TrainConfig) -> dict[str, PolicyConfig]:
    """Every policy by name, also of a configuration whose policies are not settled."""
    return dict(config.policies) or {config.policy.name: config.policy}


def beside(policy: str) -> str:
    """Who answers for a policy in rollouts that score it beside training."""
    return f"{policy}@evaluation"


class Parts:
    """Store, queue, engines, learners, gateway and workers of one job."""

    store: SpanClient
    queue: QueueClient
    groups: dict[str, InferenceGroup]
    """Engines by policy; one for which somebody else's API answers has none."""
    beside: dict[str, InferenceGroup]
    """By policy that learns, engines that keep a version while it is scored beside training."""
    learners: dict[str, LearnerGroup]
    """By policy, of those that learn."""
    batches: ActorHandle
    """Builds a step's batch (`BatchMaker`)."""
    workers: WorkerGroup
    url: str
    """The gateway's base URL, "http://HOST:PORT"."""

    def __init__(self, config: TrainConfig, folder: RunFolder, base: Path, progress: Progress):
        """`base` is the folder of `config.policy`'s base model; Ray must be up."""
        self._config = config
        self._policies = _policies(config)
        self._folder = folder
        self._base = base
        self._progress = progress
        self._stack = ExitStack()
        self.restarts = Restarts(config.training.max_restarts)
        self.groups = {}
        self.beside = {}
        self.learners = {}
        self.held = False
        """Whether rollouts wait in the queue, for engines that are not there."""
        self._opened_with: dict[str, list[str]] = {}
        """Where the door was told that engines are, by answerer."""

    @property
    def engines(self) -> InferenceGroup:
        """The engines of `config.policy`."""
        return self.groups[self._config.policy.name]

    @property
    def frozen(self) -> dict[str, InferenceGroup]:
        """The engines of the policies that stay as they are."""
        return {n: group for n, group in self.groups.items() if not self._policies[n].train}

    @property
    def learning(self) -> list[str]:
        """The policies that learn."""
        return [name for name, policy in self._policies.items() if policy.train]

    def base(self, policy: str) -> Path:
        """The folder of a policy's base model. Raises UserError when there is none."""
        if policy == self._config.policy.name:
            return self._base
        return resolve_model(self._policies[policy].model)

    def start(
        self,
        versions: Mapping[str, tuple[Path, int]] | None = None,
        learn: bool = True,
        work: bool = True,
        learners_later: bool = False,
    ) -> None:
        """Starts everything; `versions` are those that the engines answer with, by policy, each the
        folder of its weights and its number; of the other policies it is the base model.

        Without `learn` there is no learner: for jobs that only run the agent; without `work` no
        workers, for a job that starts its own. Where every policy has an upstream and nothing
        learns, no engine starts either, and no model is read. With `learners_later` the learners
        are left to `start_learners`.

        Raises InfrastructureError when a part does not start, UserError when the user can mend it.
        """
        job = self._folder.run_id
        # Ray Serve takes seconds, also to close the door of a driver that was killed.
        with meanwhile(partial(prepare_gateway, job), "Ray Serve", SERVE_S) as preparing:
            self._start(preparing, versions or {}, learn, work, learners_later)

    def _start(
        self,
        preparing: "Future[None]",
        versions: Mapping[str, tuple[Path, int]],
        learn: bool,
        work: bool,
        learners_later: bool,
    ) -> None:
        config, job = self._config, self._folder.run_id
        port = choose_port(config.gateway)
        self.url = door_url(config.gateway, port)
        roles = make_roles(config.gateway, config.policy.name, list(self._policies))
        policies = self._policies.items()
        answerers = [upstream_answerer(policy) for _, policy in policies if policy.is_upstream]
        models = {n: (self.base(n), 0) for n, policy in policies if not policy.is_upstream}
        models |= versions
        self.store = start_store(str(self._folder.spans), config.spans)
        self._at_end(self.store.close)
        self.queue = start_queue(job, config.rollouts, self._folder.path / "rollouts", self.store)
        for name, (folder, version) in models.items():
            # Their slow start runs while all else is waited for.
            self.groups[name] = self._engines(folder, name, models_of(roles, name), version)
        # Closed after the workers have stopped, so before they are there.
        self._at_end(partial(stop_gateway, job))
        if work:
            # There is nothing in the queue for them yet.
            self.workers = WorkerGroup(
                config.rollouts, config.agent, self.queue, self.store, self.url, wait=False
            )
            self._at_end(self.workers.stop)
        if models:
            answerers += self._start_models(models, roles, learn, learners_later)
        with self._progress.phase("starting the gateway and the rollout workers", slow=True):
            try:
                preparing.result(SERVE_S)
            except TimeoutError as error:
                raise InfrastructureError(f"Ray Serve did not start in {SERVE_S:g} s") from error
            start_gateway(config.gateway, port, job, self.queue.actor, roles, answerers, self.store)
            if work:
                self.workers.wait_started()
        if learners_later:
            self._start_batches()

    def _start_models(
        self,
        models: Mapping[str, tuple[Path, int]],
        roles: Sequence[Role],
        learn: bool,
        learners_later: bool,
    ) -> list[Answerer]:
        """Starts the learners; returns who answers once all engines do."""
        learner = " and the DeepSpeed learner" if learn and not learners_later else ""
        with self._progress.phase(f"starting the vLLM engine{learner}", slow=True):
            if learner:
                self._start_batches()
                self._start_learners()
            answering = dict(self.groups)
            if learn and self._config.evaluation.every:
                # Once the others are up, for whom they would only be in the way.
                answering = {n: g for n, g in self.groups.items() if g.wait_ready()}
                for name in self.learning:
                    names = models_of(roles, name)
                    self.beside[name] = self._engines(
                        *models[name][:1], name, names, models[name][1]
                    )
                answering |= {beside(name): group for name, group in self.beside.items()}
            return [Answerer(n, tuple(g.wait_ready()), g.key) for n, g in answering.items()]

    def _engines(
        self, model: Path, policy: str, names: Sequence[str], version: int
    ) -> InferenceGroup:
        """The engines of one policy, starting."""
        group = InferenceGroup(
            self._config.inference, str(model), policy, names, version, self.store
        )
        self._at_end(group.stop)
        return group

    def mend(self, step: int = 0) -> None:
        """Replaces what has died and can be replaced while the job goes on, and says so.

        `step` is the number of steps trained. Raises InfrastructureError when an engine does not
        come back, or when parts die again and again.
        """
        lines = []
        if died := self.workers.mend():
            lines.append(f"{died} rollout workers died and were replaced")
        answering = {**self.groups, **{beside(n): group for n, group in self.beside.items()}}
        for name, group in answering.items():
            if died := group.mend():
                lines.append(f"{died} engines of {name} died and are being replaced")
            if group.urls != self._opened_with.setdefault(name, list(group.urls)):
                # A node was lost, and its engine came up on another. Said again and again: who is
                # told may have been restarted.
                self.queue.engines_are_at(name, group.urls)
        # What nobody can answer waits in the queue, and not in an agent whose time runs.
        if (silent := any(not group.alive for group in self.groups.values())) != self.held:
            self.queue.hold(silent)
            self.held = silent
        for line in lines:
            self._progress.note(line)
            self.restarts.count(line, step)
        if self._config.rollouts.max_workers and not silent:
            self._fit_workers()

    def _fit_workers(self) -> None:
        change = self.workers.fit(self.queue.counts())
        if change:
            what = "more started" if change > 0 else "released"
            there = self.workers.count
            self._progress.note(f"{abs(change)} rollout workers {what}; there are {there}")

    def start_learners(self) -> None:
        """Starts the learners of a job whose other parts there are, or which needs no other."""
        with self._progress.phase("starting the DeepSpeed learner", slow=True):
            self._start_learners()

    def replace_learners(self, everyone: bool = False) -> None:
        """Other learners in place of those that died, or of all; they have the base models'
        weights.

        Raises InfrastructureError when one does not start, PartLostError when it dies meanwhile: it
        may have been placed on a node whose loss nobody has noticed yet. This may then be tried
        again.
        """
        gone = [name for name, learner in self.learners.items() if everyone or learner.lost]
        for name in gone:
            self.learners[name].stop()
        with self._progress.phase("starting the DeepSpeed learner again", slow=True):
            for name in gone:
                # What died has its place until another learns in it.
                self.learners[name] = self._start_learner(name)

    def stop(self) -> None:
        """Stops every part that was started, last first; one that fails does not keep the rest."""
        self._stack.close()

    def _start_batches(self) -> None:
        self.batches = start_batch_maker()
        self._at_end(partial(ray.kill, self.batches))

    def _start_learners(self) -> None:
        """Starts the learner of every policy that learns."""
        for name in self.learning:
            self.learners[name] = self._start_learner(name)

    def _start_learner(self, name: str) -> LearnerGroup:
        settings = settings_of(self._config, self._policies[name]).learner
        learner = LearnerGroup(settings, self.base(name), f"{self._folder.run_id}-{name}")
        self._at_end(learner.stop)
        return learner

    def _at_end(self, stop: Callable[[], None]) -> None:
        self._stack.callback(_stop_quietly, stop)


def _stop_quietly(stop: Callable[[], None]) -> None:
    # A part that died already cannot be stopped; the cluster's end clears what is left.
    try:
        stop()
    except (ray.exceptions.RayError, LightningRayError, ValueError) as error:
        log.info("while stopping: %s", error)
