"""The conductor: who does what when.

One step is: take the groups of rollouts that are ready (`Flow`), turn what happened into credited
sequences, let the learner take one step on them, publish its weights as the next version, and have
the engines take that version on. With `training.staleness` above 0 other groups run on meanwhile;
calls that are being answered stand still while the weights change. Bulk data does not pass through
here: spans and batches go from store to learner through Ray's object store.

Invariants: a version is never overwritten; a checkpoint holds weights, optimiser and `RunState` of
one moment, so a resumed run continues step count, versions and the order of tasks.
"""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from lightning_ray.agents import Task
from lightning_ray.algorithms import make_algorithm, own_loss
from lightning_ray.errors import InfrastructureError, PartLostError, UserError
from lightning_ray.evaluation import HeldoutReport, Side
from lightning_ray.gateway import make_roles
from lightning_ray.learner import StepReport, read_state
from lightning_ray.policies import PolicyRegistry
from lightning_ray.rollouts import RolloutRecord
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.training.batches import Batch
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.flow import Flow
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.hygiene_log import HygieneLog, totals
from lightning_ray.training.names import MEASURING, REHEARSAL
from lightning_ray.training.order import TaskOrder
from lightning_ray.training.parts import Parts
from lightning_ray.training.rehearsal import REHEARSED_TASKS, check_rehearsal, no_call_for, why
from lightning_ray.training.restarts import Restarts
from lightning_ray.training.rolling import (
    came_to_reward,
    note_failures,
    outcomes_of,
    rollout_specs,
    run_rollouts,
)
from lightning_ray.training.samples import write_samples
from lightning_ray.training.shipping import ship_by_value
from lightning_ray.training.state import RunState
from lightning_ray.training.versions import Versions
from lightning_ray.trajectories import task_keys

CHECKPOINT_TIMEOUT_S = 900.0
BATCH_TIMEOUT_S = 300.0


class Conductor:
    """Trains one policy, step by step."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        parts: Parts,
        tracked: TrackedRun,
        registry: PolicyRegistry,
        progress: Progress,
        tasks: Sequence[Task],
        heldout: Sequence[Task],
        base: Path,
    ):
        self._config = config
        self._folder = folder
        self._parts = parts
        self._tracked = tracked
        self._versions = Versions(config.policy, folder, registry)
        self._progress = progress
        self._order = TaskOrder(tasks, config.training.seed)
        self._heldout = list(heldout)
        self._base = base
        self._heldout_keys = task_keys((task.id, task.data) for task in heldout)
        self._hygiene = HygieneLog(folder.hygiene, config.hygiene)
        self._algorithm = make_algorithm(config.algorithm)
        ship_by_value(self._algorithm)
        self._roles = make_roles(config.gateway, config.policy.name, list(config.policies))
        self.state = RunState()
        self._restarts = Restarts(config.training.max_restarts)
        self.scored: list[Side] = []
        """What `evaluate` saw since this process began, oldest first."""
        # Rollouts of an evaluation that is done again must not be taken for the first ones.
        self._session = secrets.token_hex(3)

    @staticmethod
    def peek(checkpoint: Path) -> RunState:
        """The state that a checkpoint was saved with, without loading its weights."""
        return RunState.from_json(read_state(checkpoint))

    def restore(self, checkpoint: Path) -> None:
        """Continues from a checkpoint of this run."""
        saved = self._parts.learner.load_checkpoint(checkpoint, CHECKPOINT_TIMEOUT_S)
        self.state = RunState.from_json(saved)
        self._hygiene.restore(self.state.step)

    def frozen_weights(self) -> dict[str, list[str]]:
        """A digest of the weights of every policy that is not trained, by engine."""
        return {name: group.weight_digests() for name, group in self._parts.frozen.items()}

    def rehearse(self) -> None:
        """Tries a few tasks before the run begins. Raises UserError for what cannot work."""
        with self._progress.phase("rehearsing", slow=True):
            tasks = self._order.take(0, REHEARSED_TASKS)
            records = self._rollouts(REHEARSAL, tasks, 1)
        spans = self._parts.store.get([r.attempt_id for r in records if r.attempts])
        note = check_rehearsal(records, spans, self._roles, self._config.policy.name)
        if note is not None:
            self._progress.note(note)

    def train(self) -> None:
        """Trains up to `training.steps`, and leaves a checkpoint of the end.

        Raises InfrastructureError when a part is lost, UserError when too few rollouts come to a
        reward or a hygiene check says to stop; the last checkpoint stays usable.
        """
        if self.state.step == 0:
            self._versions.register(0, self._base, None, 0, "base model")
        flow = self._flow()
        while self.state.step < self._config.training.steps:
            try:
                self._advance(flow)
            except PartLostError as error:
                flow.abandon()
                self._go_back(error)
                flow = self._flow()

    def evaluate(self) -> HeldoutReport | None:
        """Scores the current version on the held-out tasks; None when there are none."""
        if not self._heldout:
            return None
        with self._progress.phase(f"scoring version {self.state.version}", slow=True):
            samples = self._config.evaluation.samples_per_task
            # Named after the step: the spans of two evaluations must not meet in one attempt.
            prefix = f"{MEASURING}-s{self.state.step:05d}"
            records = self._rollouts(prefix, self._heldout, samples, heldout=True)
        note_failures(records, self._progress)
        if not any(came_to_reward(record) for record in records):
            raise UserError(f"no held-out rollout came to a reward; the first: {why(records[0])}")
        label = f"{self._folder.run_id} version {self.state.version}"
        outcomes = outcomes_of(records, self._parts.store, self._config.evaluation)
        self.scored.append(Side(label, outcomes))
        return HeldoutReport.from_rewards(
            [r.outcome.rewards if came_to_reward(r) and r.outcome else None for r in records],
            policy=self._config.policy.name,
            version=self.state.version,
            step=self.state.step,
        )

    def say_results(
        self, before: float | None, after: float | None, model: Path, ui: str, fragment: str
    ) -> None:
        """Tells the person at the terminal what came of the run, and where it lies."""
        say = self._progress.note
        if before is not None and after is not None:
            say(f"held-out score {before:.3f} before, {after:.3f} after")
        found = [f"{count} {name}" for name, count in totals(self.state.history).items() if count]
        say(f"data checks found {', '.join(found) or 'nothing'}: {self._folder.hygiene}")
        say(f"learning curve    {self._folder.curve}")
        say(f"trained model     {model}")
        say(f"summary           {self._folder.summary}")
        say(f"open it in MLflow: {ui}   then http://127.0.0.1:5000/{fragment.lstrip('/')}")

    def _advance(self, flow: Flow) -> None:
        """One step, told to whoever watches, and its checkpoint where one is due."""
        begun = time.monotonic()
        metrics = self._step(flow)
        seconds = time.monotonic() - begun
        self.state.train_seconds += seconds
        metrics["seconds"] = seconds
        self.state.history.append({"step": float(self.state.step), **metrics})
        self._tracked.log_metrics(metrics, self.state.step)
        self._progress.step_done(self.state.step, metrics)
        last = self.state.step == self._config.training.steps
        if last or self.state.step % self._config.training.checkpoint_every == 0:
            self._checkpoint()

    def _step(self, flow: Flow) -> dict[str, float]:
        config = self._config
        step = self.state.step + 1
        with self._progress.phase("rollouts") as rolling:
            taken = flow.take(self.state.step, self._behind)
        records = taken.records
        if taken.stale:
            self._progress.note(f"{taken.stale} groups were too old to learn from, and dropped")
        self._require_usable(records)
        with self._progress.phase("batch") as batching:
            sequences, batch = self._batch(records)
        self._heed(step, batch)
        if len(batch.report.empty) == batch.report.attempts:
            raise no_call_for(config.policy.name, self._roles)
        with self._progress.phase("learn") as learning:
            report = self._learn(sequences, batch)
        # Before the next version: these weights, and not those, were trained.
        oldest = self.state.version if batch.oldest_version is None else batch.oldest_version
        behind = self._behind(oldest)
        with self._progress.phase("weights") as handing:
            if report is not None and report.skipped is None:
                self._publish(step)
        self.state.step = step
        flow.admit(step)
        self.state.position, self.state.in_hand = flow.position, flow.in_hand
        self.state.tokens_generated += batch.report.trainable_tokens
        self.state.left_out += batch.left_out
        if step == config.training.steps or step % config.training.checkpoint_every == 0:
            self._samples(records, sequences, batch)
        phases = {
            "rollouts": rolling.seconds,
            "batch": batching.seconds,
            "learn": learning.seconds,
            "weights": handing.seconds,
        }
        # Asynchronous rollouts go on in all phases; of the first, a step sees only what it waits.
        sampling = sum(phases.values()) if config.training.staleness else rolling.seconds
        metrics: dict[str, float] = {
            **batch.rewards,
            **({} if report is None else report.metrics()),
            **batch.hygiene.metrics(),
            "version": float(self.state.version),
            "staleness": float(behind),
            "groups_used": float(batch.used_groups),
            "groups_flat": float(batch.flat_groups),
            "groups_small": float(batch.small_groups),
            "cut_calls": float(batch.cut.calls),
            "cut_tokens": float(batch.cut.tokens),
            "left_out": float(batch.left_out),
            "sampled_tokens": float(batch.report.trainable_tokens),
            "tokens_per_second": batch.report.trainable_tokens / max(sampling, 1e-9),
            "attempts": float(sum(len(record.attempts) for record in records)),
            "tasks": float(taken.tasks),
            "groups_stale": float(taken.stale),
            **{f"seconds_{name}": seconds for name, seconds in phases.items()},
        }
        return metrics

    def _flow(self) -> Flow:
        """Groups from where the run stands."""
        flow = Flow(
            self._config, self._parts.queue, self._order, self._oldest, self._progress, self._mend
        )
        flow.restore(self.state.position, self.state.in_hand)
        return flow

    def _mend(self) -> None:
        """Replaces parts that have died, such as rollout workers, and goes on."""
        for line in self._parts.mend():
            self._progress.note(line)
            self._restarts.count(line, self.state.step)

    def _go_back(self, lost: PartLostError) -> None:
        """Starts the learner anew and goes on from the last checkpoint, or from the beginning.

        Raises InfrastructureError when that happens again and again.
        """
        why_lost = str(lost).splitlines()[0]
        self._restarts.count(why_lost, self.state.step)
        self._parts.replace_learner()
        checkpoint = self._folder.last_checkpoint()
        if checkpoint is not None:
            self.restore(checkpoint)
        else:
            self.state = RunState(heldout_before=self.state.heldout_before)
        version = self.state.version
        weights = self._base if version == 0 else self._folder.version(version)
        self._parts.engines.update_weights(str(weights), version)
        where = f"step {self.state.step}" if self.state.step else "the beginning"
        self._progress.note(f"{why_lost}; going on from {where}")

    def _behind(self, version: int) -> int:
        """How many updates of the weights there were since `version`."""
        return sum(number > version for number in self.state.published)

    def _oldest(self, records: Sequence[RolloutRecord]) -> dict[str, int]:
        """The oldest version that sampled a token of each group, by group."""
        attempts = [record.attempt_id for record in records if record.attempts]
        asking = self._parts.batches.oldest.remote(
            list(records), self._parts.store.read(attempts), self._config.policy.name
        )
        return self._built(asking, "the versions of a batch's tokens were not read")

    def _rollouts(
        self,
        prefix: str,
        tasks: Sequence[Task],
        samples: int,
        *,
        heldout: bool = False,
    ) -> list[RolloutRecord]:
        """Runs `samples` rollouts of each task; returns their records in order, all ended."""
        specs = rollout_specs(prefix, self._session, tasks, samples, self._config, heldout=heldout)
        limit = self._config.rollouts.batch_timeout_s
        return run_rollouts(self._parts.queue, specs, limit, self._progress, self._mend)

    def _batch(self, records: Sequence[RolloutRecord]) -> tuple["ray.ObjectRef", Batch]:
        """The step's batch: a reference to its sequences, and what is known of them."""
        # Those that were tried again as well: the checks say why.
        ended = [attempt for record in records for attempt, _ in record.attempts]
        # The spans go from the store to it, and its table to the learner, without passing through
        # this process.
        sequences, batch = self._parts.batches.make.options(num_returns=2).remote(
            list(records),
            self._parts.store.read(ended),
            self._algorithm,
            self._config.policy.name,
            self._config.hygiene,
            self._heldout_keys or None,
            self._config.algorithm,
            self._config.credit,
            self._config.training.max_sequence_tokens,
        )
        return sequences, self._built(batch, "the step's batch was not built")

    @staticmethod
    def _built(asked: "ray.ObjectRef", what: str) -> Any:
        """What the batch maker answers. Raises InfrastructureError, beginning with `what`."""
        try:
            return ray.get(asked, timeout=BATCH_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"{what} within {BATCH_TIMEOUT_S:g} s") from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise InfrastructureError(f"{what}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise InfrastructureError(f"{what}: {error}") from error

    def _heed(self, step: int, batch: Batch) -> None:
        """Records what the checks found. Raises UserError when one of them says to stop."""
        for line in self._hygiene.add(step, batch.hygiene, self.state.history):
            self._progress.note(line)
        if (reason := batch.hygiene.why_stopped(f"in step {step}")) is not None:
            self._tracked.log_metrics(batch.hygiene.metrics(), step)
            self._tracked.log_artifact(self._folder.hygiene)
            raise UserError(reason)

    def _learn(self, sequences: "ray.ObjectRef", batch: Batch) -> StepReport | None:
        """One learner step; None when nothing is left of the batch to learn from."""
        if batch.rows == 0:
            self._progress.note("no group had any contrast: nothing to learn in this step")
            return None
        report = self._parts.learner.step(
            sequences,
            self._algorithm.loss,
            self._config.training.step_timeout_s,
            own_loss(self._algorithm),
        )
        if report.skipped is not None:
            self._progress.note(f"the learner skipped a step: {report.skipped}")
        return report

    def _publish(self, step: int) -> None:
        """Makes the learner's weights the next version, and hands it to the engines."""
        number, path = self._versions.publish(
            self._parts.learner, self.state.version, step, self._config.algorithm.name
        )
        # What died since the rollouts were waited for is replaced first, and its agents spared.
        self._mend()
        self._parts.engines.update_weights(str(path), number)
        self.state.version = number
        self.state.published.append(number)
        # A run is resumed with the version its checkpoint was published as.
        kept = self._folder.whole_checkpoints()
        self._versions.prune({self.peek(checkpoint).version for checkpoint in kept})

    def _checkpoint(self) -> None:
        with self._progress.phase("checkpoint"):
            path = self._folder.checkpoint(self.state.step)
            # A step that was trained again after a resume leaves the checkpoint that is there.
            if not path.exists():
                self._parts.learner.save_checkpoint(
                    path, self.state.to_json(), CHECKPOINT_TIMEOUT_S
                )
            self._folder.prune_checkpoints(self._config.training.keep_checkpoints)

    def _require_usable(self, records: Sequence[RolloutRecord]) -> None:
        usable = sum(came_to_reward(record) for record in records)
        note_failures(records, self._progress)
        if usable < self._config.training.min_usable * len(records):
            reason = next((why(record) for record in records if not came_to_reward(record)), "")
            raise UserError(
                f"only {usable} of {len(records)} rollouts of step {self.state.step + 1} came to a "
                f"reward (training.min_usable={self._config.training.min_usable}); "
                f"the first that did not: {reason}"
            )

    def _samples(
        self, records: Sequence[RolloutRecord], sequences: "ray.ObjectRef", batch: Batch
    ) -> None:
        count = self._config.tracking.sample_trajectories
        if batch.rows and count:
            table = ray.get(sequences, timeout=BATCH_TIMEOUT_S).slice(0, count)
            write_samples(self._folder.trajectories, records, table, self._base)
