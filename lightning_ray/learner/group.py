"""The learner as the conductor sees it: a group of actors that act as one.

Invariant: batches do not pass through here. A batch is a reference into Ray's object store, every
rank reads it there and takes its share; what comes back are numbers. Every wait has a limit, and
says what it waited for when that is over.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_ray.algorithms.base import TokenLoss
from lightning_ray.algorithms.config import LossConfig, check_loss
from lightning_ray.errors import InfrastructureError, LightningRayError, PartLostError
from lightning_ray.learner.config import LearnerConfig, check_learner, check_model_dir
from lightning_ray.learner.report import StepReport
from lightning_ray.policies.handover import Handed, Way

if TYPE_CHECKING:
    import ray


class LearnerGroup:
    """`num_ranks` learner actors. Methods block; an event loop calls them in a thread."""

    def __init__(self, config: LearnerConfig, model_dir: str | Path, run_name: str) -> None:
        """Start the actors and wait until every one has loaded the model.

        Args:
            config: settings of the group.
            model_dir: a Hugging Face model folder that every node can read.
            run_name: what the actors are called after, for a person who looks at the cluster.

        Raises:
            UserError: a setting or the model folder cannot work; no actor was started.
            InfrastructureError: the group was not ready within `config.start_timeout_s`.
        """
        import ray

        from lightning_ray.learner.worker import LearnerWorker

        check_learner(config)
        folder = check_model_dir(model_dir)
        self.config = config
        self.lost = False
        """Whether an actor has died: then the group can do no more."""
        actor = ray.remote(LearnerWorker)
        self._workers = [
            actor.options(
                name=f"learner-{run_name}-{rank}",
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                label_selector=config.node_labels or None,
                runtime_env={"env_vars": _environment(config)},
            ).remote(config, str(folder), rank)
            for rank in range(config.num_ranks)
        ]
        try:
            self._start(config.start_timeout_s)
        except BaseException:
            self.stop()
            raise

    def step(
        self,
        batch: "ray.ObjectRef",
        loss: LossConfig,
        timeout_s: float,
        own: TokenLoss | None = None,
    ) -> StepReport:
        """Train one step on the batch (an object reference of a table of `SEQUENCE_SCHEMA`).

        `own` is the algorithm's own loss, in place of the one that `loss` names.

        Raises:
            PartLostError: an actor was lost. Whether the weights changed is then unknown: go on
                from a checkpoint, with a group of its own.
            InfrastructureError: it took longer than `timeout_s`.
        """
        check_loss(loss)
        report: StepReport = self._call("step", timeout_s, batch, loss, own)[0]
        return report

    def logprobs(self, batch: "ray.ObjectRef", timeout_s: float) -> list[npt.NDArray[np.float32]]:
        """Logprobs under the present weights; see `LearnerWorker.logprobs`."""
        result: list[npt.NDArray[np.float32]] = self._call("logprobs", timeout_s, batch)[0]
        return result

    def publish(self, path: str | Path, timeout_s: float) -> Path:
        """Write the present weights as a model folder; returns its absolute path.

        Raises:
            FileExistsError: the folder exists; a version is never overwritten.
        """
        target = _new_folder(path)
        self._call("publish", timeout_s, str(target))
        return target

    def hand_over(self, path: str | Path, way: Way, timeout_s: float) -> Handed:
        """Hand the present weights over to engines, as the version of a model folder.

        On another way than `disk` the folder is there after `settle`.

        Raises:
            FileExistsError: the folder exists; a version is never overwritten.
        """
        target = _new_folder(path)
        handed: Handed = self._call("hand_over", timeout_s, str(target), way)[0]
        return handed

    def node(self, timeout_s: float = 30.0) -> str:
        """The node that weights are handed over from, as Ray calls it."""
        found: str = self._get([self._workers[0].node.remote()], timeout_s, "the learner's node")[0]
        return found

    def gpu(self, timeout_s: float = 30.0) -> str:
        """The node and GPU that weights are handed over from; "" where they are not on a GPU."""
        found: str = self._get([self._workers[0].gpu.remote()], timeout_s, "the learner's GPU")[0]
        return found

    def taken(self, handed: Handed, timeout_s: float = 30.0) -> None:
        """Every engine has what was handed over: the learner keeps it for nobody any longer.

        Raises InfrastructureError when that does not give a GPU's memory back in time.
        """
        if not self._workers:
            raise InfrastructureError("the learner was stopped before every engine had its weights")
        told = self._workers[0].taken.remote()
        if handed.gpu is not None:
            self._get([told], timeout_s, "the learner's GPU to be cleared")
        # Else a learner that died is told of by whoever needs it next.

    def settle(self, timeout_s: float) -> None:
        """Wait until what was handed over last lies on disk, whole.

        Raises:
            InfrastructureError: it could not be written, or not in time.
        """
        if not self._workers:
            raise InfrastructureError("the learner was stopped before settle")
        limit = timeout_s + 30.0
        settling = [self._workers[0].settle.remote(timeout_s)]
        self._get(settling, limit, "the learner's version to be written")

    def save_checkpoint(self, path: str | Path, state: dict[str, Any], timeout_s: float) -> Path:
        """Save everything a later run needs to go on, with the caller's own JSON state.

        Returns:
            The folder, absolute. It appears whole, or, if this is cut short, not at all.

        Raises:
            FileExistsError: the folder exists.
        """
        target = _new_folder(path)
        self._call("save_checkpoint", timeout_s, str(target), state)
        return target

    def load_checkpoint(self, path: str | Path, timeout_s: float) -> dict[str, Any]:
        """Go on from a checkpoint; returns the state that was saved with it.

        Raises:
            UserError: there is none, or it does not fit this group.
        """
        state: dict[str, Any] = self._call(
            "load_checkpoint", timeout_s, str(Path(path).absolute())
        )[0]
        return state

    def stop(self) -> None:
        """End the actors. What was not saved is lost; harmless when called again."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def _start(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        host, port, dtype = self._get(
            [self._workers[0].address.remote()],
            timeout_s,
            f"learner actor 0 of {self.config.num_ranks} to start; does the cluster have "
            f"{self.config.num_cpus} CPUs and {self.config.num_gpus} GPUs free for each?",
        )[0]
        self._get(
            [worker.setup.remote(host, port, dtype) for worker in self._workers],
            deadline - time.monotonic(),
            f"{self.config.num_ranks} learner actors to load the model; does the cluster have "
            f"{self.config.num_cpus} CPUs and {self.config.num_gpus} GPUs free for each?",
        )

    def _call(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        """Call a method on every rank and wait for all."""
        if not self._workers:
            raise InfrastructureError(f"the learner was stopped before {method}")
        references = [getattr(worker, method).remote(*arguments) for worker in self._workers]
        return self._get(references, timeout_s, f"the learner's {method}")

    def _get(self, references: list[Any], timeout_s: float, what: str) -> list[Any]:
        import ray

        try:
            results: list[Any] = ray.get(references, timeout=max(0.0, timeout_s))
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"waited {timeout_s:.0f} s for {what}") from error
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            self.lost = True
            raise PartLostError(f"a learner actor was lost during {what}: {error}") from error
        except ray.exceptions.RayTaskError as error:
            # Ray wraps what an actor raised; what is meant for the user must stay so.
            if isinstance(error.cause, LightningRayError | FileExistsError):
                raise error.cause from error
            raise
        return results


def _new_folder(path: str | Path) -> Path:
    """Absolute, and refused here if it exists rather than by every rank."""
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists and is never overwritten")
    return target


def _environment(config: LearnerConfig) -> dict[str, str]:
    """The actor's environment: its share of the cores, and no network but the ranks' own."""
    threads = str(config.num_threads)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }
