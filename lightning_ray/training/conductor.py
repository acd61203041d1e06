"""The conductor: who does what when.

One step is: take the groups of rollouts that are ready (`Flow`), turn what happened into credited
sequences, let the learner of every policy that is trained take one step on its own (`Trainee`),
publish its weights as the policy's next version, and have the engines take that version on. With
`training.staleness` above 0 other groups run on meanwhile; calls that are being answered stand
still while the weights change. Bulk data does not pass through here: spans and batches go from
store to learner through Ray's object store.

Invariants: a version is never overwritten; a checkpoint holds weights, optimiser and `RunState` of
one moment, so a resumed run continues step count, versions and the order of tasks.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lightning_ray.agents import Task
from lightning_ray.errors import InfrastructureError, PartLostError, UserError
from lightning_ray.evaluation import HeldoutReport, Side
from lightning_ray.gateway import make_roles
from lightning_ray.policies import PolicyRegistry
from lightning_ray.rollouts import RolloutRecord
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.training.batches import Batch
from lightning_ray.training.checkpoints import Checkpoints
from lightning_ray.training.config import TrainConfig, trained_policies
from lightning_ray.training.flow import Flow
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.hygiene_log import HygieneLog, totals
from lightning_ray.training.names import REHEARSAL
from lightning_ray.training.order import TaskOrder
from lightning_ray.training.parts import Parts
from lightning_ray.training.rehearsal import REHEARSED_TASKS, check_rehearsal, no_call_for, why
from lightning_ray.training.rolling import (
    came_to_reward,
    note_failures,
    rollout_specs,
    run_rollouts,
)
from lightning_ray.training.samples import write_samples
from lightning_ray.training.scores import Scores
from lightning_ray.training.state import RunState
from lightning_ray.training.step_metrics import step_metrics
from lightning_ray.training.threads import begin
from lightning_ray.training.trainee import Lesson, Trainee, built
from lightning_ray.training.versions import Versions
from lightning_ray.trajectories import task_keys


class Conductor:
    """Trains the policies that learn, step by step."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        parts: Parts,
        tracked: TrackedRun,
        uri: str,
        progress: Progress,
        tasks: Sequence[Task],
        heldout: Sequence[Task],
    ):
        """`uri` is that of the MLflow store in which versions are registered."""
        self._config = config
        self._folder = folder
        self._parts = parts
        self._tracked = tracked
        self._progress = progress
        self._order = TaskOrder(tasks, config.training.seed)
        self._heldout_keys = task_keys((task.id, task.data) for task in heldout)
        self._hygiene = HygieneLog(folder.hygiene, config.hygiene)
        self._checkpoints = Checkpoints(folder, config.training.keep_checkpoints)
        self._trainees = []
        for policy in trained_policies(config):
            registry = PolicyRegistry(uri, policy.name, tracked.run_id)
            versions = Versions(policy, folder, registry)
            self._trainees.append(Trainee(config, policy, parts, versions))
        self._roles = make_roles(config.gateway, config.policy.name, list(config.policies))
        self.state = RunState()
        self._scores = Scores(config, folder, parts, tracked, progress, heldout)
        # Rollouts of a rehearsal that is done again must not be taken for the first ones.
        self._session = secrets.token_hex(3)
        self._begun: Flow | None = None
        """Of a run that was resumed, what agents work on before it trains."""

    @property
    def trained(self) -> list[str]:
        """The policies that learn."""
        return [trainee.name for trainee in self._trainees]

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint of this run; all parts are there but the learners.

        Agents go on at once, and the learners start meanwhile.
        """
        self.state = self._checkpoints.peek(checkpoint)
        self._clear_up()
        self._begun = self._flow()
        self._begun.admit(self.state.step)
        self._parts.start_learners()
        self._checkpoints.load(checkpoint, self._parts.learners)

    def _restore(self, checkpoint: Path) -> None:
        self.state = self._checkpoints.load(checkpoint, self._parts.learners)
        self._clear_up()

    def _clear_up(self) -> None:
        """Leaves behind what belongs to steps that are not the run's any more."""
        for trainee in self._trainees:
            trainee.clear_up()
        self._hygiene.restore(self.state.step)

    @property
    def versions(self) -> dict[str, int]:
        """The version that each policy that learns stands at."""
        return {name: self.state.of(name).version for name in self.trained}

    def frozen_weights(self) -> dict[str, list[str]]:
        """A digest of the weights of every policy that is not trained, by engine."""
        return {name: group.weight_digests() for name, group in self._parts.frozen.items()}

    def rehearse(self) -> None:
        """Tries a few tasks before the run begins. Raises UserError for what cannot work."""
        with self._progress.phase("rehearsing", slow=True):
            tasks = self._order.take(0, REHEARSED_TASKS)
            specs = rollout_specs(REHEARSAL, self._session, tasks, 1, self._config)
            limit = self._config.rollouts.batch_timeout_s
            records = run_rollouts(self._parts.queue, specs, limit, self._progress, self._mend)
        spans = self._parts.store.get([r.attempt_id for r in records if r.attempts])
        note = check_rehearsal(records, spans, self._roles, self.trained)
        if note is not None:
            self._progress.note(note)

    def train(self) -> None:
        """Trains up to `training.steps`, and leaves a checkpoint of the end.

        Raises InfrastructureError when a part is lost, UserError when too few rollouts come to a
        reward or a hygiene check says to stop; the last checkpoint stays usable.
        """
        if self.state.step == 0:
            for trainee in self._trainees:
                trainee.register_base()
        flow, self._begun = self._begun or self._flow(), None
        while self.state.step < self._config.training.steps:
            try:
                self._advance(flow)
            except PartLostError as error:
                flow.abandon()
                lost: PartLostError | None = error
                while lost is not None:
                    try:
                        self._go_back(lost)
                        lost = None
                    except PartLostError as another:
                        # Two that died together, or one that died meanwhile.
                        lost = another
                flow = self._flow()
        if left := flow.abandon():
            # A run that is resumed with more steps does them again.
            self._progress.note(f"cancelled {left} tasks that were begun past the last step")
        self._scores.finish(self.state.history, self._mend)

    def evaluate(self) -> HeldoutReport | None:
        """Scores the current version on the held-out tasks; None when there are none."""
        return self._scores.score(self.state.step, self.versions, self._mend)

    @property
    def scored(self) -> list[Side]:
        """What `evaluate` saw since this process began, oldest first."""
        return self._scores.sides

    def say_results(
        self,
        before: float | None,
        after: float | None,
        models: Mapping[str, Path],
        ui: str,
        fragment: str,
    ) -> None:
        """Tells the person at the terminal what came of the run, and where it lies."""
        say = self._progress.note
        if before is not None and after is not None:
            say(f"held-out score {before:.3f} before, {after:.3f} after")
        found = [f"{count} {name}" for name, count in totals(self.state.history).items() if count]
        say(f"data checks found {', '.join(found) or 'nothing'}: {self._folder.hygiene}")
        say(f"learning curve    {self._folder.curve}")
        for policy, model in models.items():
            of = f" of {policy}" if len(models) > 1 else ""
            say(f"trained model{of}     {model}")
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
        if self._scores.due(self.state.step):
            for trainee in self._trainees:
                trainee.settle()
        now = {one.name: one.standing(self.state.of(one.name)) for one in self._trainees}
        self._scores.beside(self.state.step, now, self.state.history)

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
            lessons = self._lessons(records)
        self._heed(step, {name: lesson.batch for name, lesson in lessons.items()})
        reports = [lesson.batch.report for lesson in lessons.values()]
        if all(len(report.empty) == report.attempts for report in reports):
            raise no_call_for(self.trained, self._roles)
        with self._progress.phase("learn") as learning:
            self._learn(lessons)
        with self._progress.phase("weights") as handing:
            self._publish(step, lessons)
        self.state.step = step
        flow.admit(step)
        self.state.position, self.state.in_hand = flow.position, flow.in_hand
        of_policies = step_metrics(lessons, self.versions)
        self.state.tokens_generated += int(of_policies["sampled_tokens"])
        self.state.left_out += int(of_policies["left_out"])
        if step == config.training.steps or step % config.training.checkpoint_every == 0:
            self._samples(records, lessons)
        phases = {
            "rollouts": rolling.seconds,
            "batch": batching.seconds,
            "learn": learning.seconds,
            "weights": handing.seconds,
        }
        # Asynchronous rollouts go on in all phases; of the first, a step sees only what it waits.
        sampling = sum(phases.values()) if config.training.staleness else rolling.seconds
        return {
            **next(iter(lessons.values())).batch.rewards,
            **of_policies,
            "tokens_per_second": of_policies["sampled_tokens"] / max(sampling, 1e-9),
            "attempts": float(sum(len(record.attempts) for record in records)),
            "tasks": float(taken.tasks),
            "groups_stale": float(taken.stale),
            **{f"seconds_{name}": seconds for name, seconds in phases.items()},
        }

    def _flow(self) -> Flow:
        """Groups from where the run stands."""
        flow = Flow(
            self._config, self._parts.queue, self._order, self._oldest, self._progress, self._mend
        )
        flow.restore(self.state.position, self.state.in_hand)
        return flow

    def _mend(self) -> None:
        """Replaces parts that have died, such as rollout workers, and goes on."""
        try:
            self._parts.mend(self.state.step)
        except InfrastructureError:
            # An engine may wait for weights of a learner that died with it: then this says so.
            for trainee in self._trainees:
                trainee.settle()
            raise

    def _go_back(self, lost: PartLostError) -> None:
        """Starts the learner anew and goes on from the last checkpoint, or from the beginning.

        Raises InfrastructureError when that happens again and again.
        """
        why_lost = str(lost).splitlines()[0]
        self._parts.restarts.count(why_lost, self.state.step)
        for trainee in self._trainees:
            trainee.give_up()
        checkpoint = self._folder.last_checkpoint()
        # Those that live have the weights of steps that are lost; without a checkpoint to load,
        # they begin anew as well.
        self._parts.replace_learners(everyone=checkpoint is None)
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self.state = RunState(heldout_before=self.state.heldout_before)
            self._clear_up()
        self._scores.go_back(self.state.step)
        for trainee in self._trainees:
            trainee.hand_over(self.state.of(trainee.name))
        where = f"step {self.state.step}" if self.state.step else "the beginning"
        self._progress.note(f"{why_lost}; going on from {where}")

    def _behind(self, versions: Mapping[str, int]) -> int:
        """How many updates of the weights there were since such versions, the most of any."""
        return max(self.state.of(name).behind(version) for name, version in versions.items())

    def _oldest(self, records: Sequence[RolloutRecord]) -> dict[str, dict[str, int]]:
        """The oldest version that sampled a token of each group, by group and policy."""
        attempts = [record.attempt_id for record in records if record.attempts]
        spans, oldest = self._parts.store.read(attempts), self._parts.batches.oldest
        found: dict[str, dict[str, int]]
        _, found = built(
            lambda: [oldest.remote(list(records), spans, self.trained)],
            "the versions of a batch's tokens were not read",
        )
        return found

    def _lessons(self, records: Sequence[RolloutRecord]) -> dict[str, Lesson]:
        """What each policy learns from in this step."""
        # Those that were tried again as well: the checks say why.
        ended = [attempt for record in records for attempt, _ in record.attempts]
        # The spans go from the store to the batch maker, and its tables to the learners, without
        # passing through this process.
        spans, heldout = self._parts.store.read(ended), self._heldout_keys or None
        return {one.name: one.lesson(records, spans, heldout) for one in self._trainees}

    def _heed(self, step: int, batches: Mapping[str, Batch]) -> None:
        """Records what the checks found. Raises UserError when one of them says to stop."""
        reports = {name: batch.hygiene for name, batch in batches.items()}
        for line in self._hygiene.add(step, reports, self.state.history):
            self._progress.note(line)
        for report in reports.values():
            if (reason := report.why_stopped(f"in step {step}")) is not None:
                self._tracked.log_metrics(report.metrics(), step)
                self._tracked.log_artifact(self._folder.hygiene)
                raise UserError(reason)

    def _learn(self, lessons: Mapping[str, Lesson]) -> None:
        """One step of every learner: at the same time where each has processors of its own."""
        states = {trainee.name: self.state.of(trainee.name) for trainee in self._trainees}
        works = [
            partial(trainee.learn, lessons[trainee.name], states[trainee.name])
            for trainee in self._trainees
        ]
        if len(works) > 1 and all(trainee.has_gpus for trainee in self._trainees):
            for learning in [begin(work, "learn") for work in works]:
                # Each has a limit of its own.
                learning.result()
        else:
            for work in works:
                work()
        for name, lesson in lessons.items():
            of = f" for {name}" if len(lessons) > 1 else ""
            if lesson.report is None:
                self._progress.note(f"no group had any contrast{of}: nothing to learn in this step")
            elif lesson.report.skipped is not None:
                self._progress.note(f"the learner skipped a step{of}: {lesson.report.skipped}")

    def _publish(self, step: int, lessons: Mapping[str, Lesson]) -> None:
        """Makes the weights of those that learnt their policies' next versions."""
        for trainee in self._trainees:
            if lessons[trainee.name].learnt:
                # What died since the rollouts were waited for is replaced, and its agents spared.
                trainee.publish(self.state.of(trainee.name), step, self._mend)
                # A run is resumed with the version its checkpoint was published as.
                held = self._scores.held(trainee.name)
                trainee.prune({*self._checkpoints.needed(trainee.name), *held})
        if self._parts.held:
            # Engines have come back to take the version on: agents begin now, and not only once
            # there is a checkpoint.
            self._mend()

    def _checkpoint(self) -> None:
        with self._progress.phase("checkpoint"):
            # A run that is resumed here goes on with these versions.
            for trainee in self._trainees:
                trainee.settle()
            self._checkpoints.save(self._parts.learners, self.state)

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

    def _samples(self, records: Sequence[RolloutRecord], lessons: Mapping[str, Lesson]) -> None:
        count = self._config.tracking.sample_trajectories
        for trainee in self._trainees:
            lesson = lessons[trainee.name]
            if lesson.batch.rows and count:
                path = self._folder.trajectories(trainee.name)
                model = self._parts.base(trainee.name)
                write_samples(path, records, trainee.sample(lesson, count), model)
