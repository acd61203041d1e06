"""The running parts of a job: started in an order that overlaps their waits, stopped in reverse."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import ray

from lightning_ray.errors import LightningRayError
from lightning_ray.gateway import choose_port, start_gateway, stop_gateway
from lightning_ray.inference import InferenceGroup
from lightning_ray.learner import LearnerGroup
from lightning_ray.rollouts import QueueClient, WorkerGroup, start_queue
from lightning_ray.spans import SpanClient, start_store
from lightning_ray.tracking import Progress
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.folder import RunFolder

log = logging.getLogger(__name__)


class Parts:
    """Store, queue, engines, learner, gateway and workers of one job; a context manager."""

    store: SpanClient
    queue: QueueClient
    engines: InferenceGroup
    learner: LearnerGroup
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

    def start(self, model: Path, version: int, learn: bool = True, work: bool = True) -> None:
        """Starts everything; the engines answer with version `version`, whose weights are `model`.

        Without `learn` there is no learner: for jobs that only run the agent; without
        `work` no workers, for a job that starts its own.

        Raises InfrastructureError when a part does not start, UserError when the user can mend it.
        """
        config = self._config
        port = choose_port(config.gateway)
        self.store = start_store(str(self._folder.spans), config.spans)
        self._at_end(self.store.close)
        self.queue = start_queue(self._folder.run_id, config.rollouts)
        learner = " and the DeepSpeed learner" if learn else ""
        with self._progress.phase(f"starting the vLLM engine{learner}", slow=True):
            # The engine's slow start runs while the learner's is waited for.
            self.engines = InferenceGroup(
                config.inference,
                str(model),
                config.policy.name,
                config.gateway.models,
                version,
                self.store,
            )
            self._at_end(self.engines.stop)
            if learn:
                self.learner = LearnerGroup(config.learner, self._base, self._folder.run_id)
                self._at_end(self.learner.stop)
            urls = self.engines.wait_ready()
        with self._progress.phase("starting the gateway and the rollout workers", slow=True):
            self._at_end(stop_gateway)
            self.url = start_gateway(config.gateway, port, self.queue.actor, urls, self.engines.key)
            if work:
                self.workers = WorkerGroup(
                    config.rollouts, config.agent, self.queue, self.store, self.url
                )
                self._at_end(self.workers.stop)

    def stop(self) -> None:
        """Stops every part that was started, last first; one that fails does not keep the rest."""
        self._stack.close()

    def _at_end(self, stop: Callable[[], None]) -> None:
        self._stack.callback(_stop_quietly, stop)


def _stop_quietly(stop: Callable[[], None]) -> None:
    # A part that died already cannot be stopped; the cluster's end clears what is left.
    try:
        stop()
    except (ray.exceptions.RayError, LightningRayError, ValueError) as error:
        log.info("while stopping: %s", error)
