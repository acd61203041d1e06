"""Supervised tuning: steps of cross-entropy over chosen samples, and a version at each epoch's end.

Invariants: the samples of a step are a pure function of seed and step; a checkpoint holds weights,
optimiser and `RunState` of one moment, so a resumed run takes the steps that it would have taken.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import ray

from lightning_ray.learner import LearnerGroup, StepReport
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.training.checkpoints import Checkpoints
from lightning_ray.training.finetuning import FinetuneConfig
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.order import SampleOrder
from lightning_ray.training.selection import Samples
from lightning_ray.training.state import RunState
from lightning_ray.training.versions import Versions

TakeOn = Callable[[str, int], object]
"""(folder of the weights, version): have the engines answer with it."""


class Tuner:
    """Tunes one policy on samples."""

    def __init__(
        self,
        config: FinetuneConfig,
        folder: RunFolder,
        versions: Versions,
        tracked: TrackedRun,
        progress: Progress,
        samples: Samples,
        base: Path,
    ):
        self._config = config
        self._policy = config.policy.name
        self._checkpoints = Checkpoints(folder, config.training.keep_checkpoints)
        self._versions = versions
        self._tracked = tracked
        self._progress = progress
        self._samples = samples
        self._base = base
        self._order = sample_order(config, samples)
        self.steps = config.finetuning.epochs * self._order.steps_per_epoch
        """Steps in all, those before a resume included."""

    def train(self, learner: LearnerGroup, state: RunState, take_on: TakeOn | None) -> None:
        """Trains from `state` on to the last step, and leaves a checkpoint of the end.

        `take_on` hands a version to the engines, where there are any. Raises InfrastructureError
        when the learner is lost; the last checkpoint stays usable.
        """
        config = self._config
        if state.step == 0:
            self._versions.register(0, self._base, None, 0, "base model")
        while state.step < self.steps:
            begun = time.monotonic()
            with self._progress.phase("learn") as learning:
                report = self._learn(learner, state.step)
            state.step += 1
            last = state.step == self.steps
            if state.step % self._order.steps_per_epoch == 0:
                with self._progress.phase("weights"):
                    self._publish(learner, state, take_on)
            seconds = time.monotonic() - begun
            state.train_seconds += seconds
            metrics = {
                **_metrics(report),
                "tokens_per_second": report.sampled_tokens / max(learning.seconds, 1e-9),
                "epoch": state.step / self._order.steps_per_epoch,
                "version": float(state.of(self._policy).version),
                "seconds_learn": learning.seconds,
                "seconds": seconds,
            }
            state.history.append({"step": float(state.step), **metrics})
            self._tracked.log_metrics(metrics, state.step)
            self._progress.step_done(state.step, metrics)
            if last or state.step % config.training.checkpoint_every == 0:
                self._checkpoint(learner, state)

    def _learn(self, learner: LearnerGroup, step: int) -> StepReport:
        rows = self._samples.table.take(pa.array(self._order.batch(step)))
        timeout_s = self._config.training.step_timeout_s
        report = learner.step(ray.put(rows), self._config.loss, timeout_s)
        if report.skipped is not None:
            self._progress.note(f"the learner skipped a step: {report.skipped}")
        return report

    def _publish(self, learner: LearnerGroup, state: RunState, take_on: TakeOn | None) -> None:
        mine = state.of(self._policy)
        number, path = self._versions.publish(
            learner,
            mine.version,
            state.step,
            f"finetune on {self._samples.counts.samples} samples of "
            f"{', '.join(self._samples.runs)}",
        )
        if take_on is not None:
            take_on(str(path), number)
        mine.version = number
        self._versions.prune(self._checkpoints.needed(self._policy))

    def _checkpoint(self, learner: LearnerGroup, state: RunState) -> None:
        with self._progress.phase("checkpoint"):
            self._checkpoints.save({self._policy: learner}, state)


def sample_order(config: FinetuneConfig, samples: Samples) -> SampleOrder:
    """Which samples each step is taken on."""
    tuning = config.finetuning
    return SampleOrder(samples.counts.samples, tuning.batch_size, tuning.seed)


def _metrics(report: StepReport) -> dict[str, float]:
    return {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "entropy": report.entropy,
        "logprob_abs_difference": report.logprob_abs_difference,
        "sampled_tokens": float(report.sampled_tokens),
        "tokens_batch": float(report.total_tokens),
        "tokens_computed": float(report.computed_tokens),
        "learning_rate": report.learning_rate,
    }
