"""Scores on the held-out tasks: before training, after it, and beside it."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_ray.agents import Task
from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.evaluation import HeldoutReport, Side
from lightning_ray.rollouts import RolloutRecord
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.training.beside import Beside, Scored
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.names import MEASURING
from lightning_ray.training.parts import Parts
from lightning_ray.training.rehearsal import why
from lightning_ray.training.rolling import (
    came_to_reward,
    note_failures,
    outcomes_of,
    rollout_specs,
    run_rollouts,
)

SLICE_S = 2.0

History = list[dict[str, float]]
"""Metrics of every step trained, oldest first."""


class Scores:
    """The scores of one run."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        parts: Parts,
        tracked: TrackedRun,
        progress: Progress,
        heldout: Sequence[Task],
    ):
        self._config = config
        self._folder = folder
        self._parts = parts
        self._tracked = tracked
        self._progress = progress
        self._heldout = list(heldout)
        self._beside = Beside(config, parts, self._heldout)
        self.sides: list[Side] = []
        """What `score` saw since this process began, oldest first."""
        # Rollouts of a score that is made again must not be taken for the first ones.
        self._session = secrets.token_hex(3)

    def score(
        self, step: int, versions: Mapping[str, int], watch: Callable[[], None]
    ) -> HeldoutReport | None:
        """Scores the versions that the engines have; None when there are no held-out tasks.

        `watch` is called while it waits. Raises UserError when no rollout came to a reward.
        """
        if not self._heldout:
            return None
        with self._progress.phase(f"scoring {in_words(versions)}", slow=True):
            specs = rollout_specs(
                # Named after the step: the spans of two scores must not meet in one attempt.
                f"{MEASURING}-s{step:05d}",
                self._session,
                self._heldout,
                self._config.evaluation.samples_per_task,
                self._config,
                heldout=True,
            )
            limit = self._config.rollouts.batch_timeout_s
            records = run_rollouts(self._parts.queue, specs, limit, self._progress, watch)
        note_failures(records, self._progress)
        if not any(came_to_reward(record) for record in records):
            raise UserError(f"no held-out rollout came to a reward; the first: {why(records[0])}")
        label = f"{self._folder.run_id} {in_words(versions)}"
        outcomes = outcomes_of(records, self._parts.store, self._config.evaluation)
        self.sides.append(Side(label, outcomes))
        return self._report(step, versions, records)

    def due(self, step: int) -> bool:
        """Whether the version of a step is to be scored beside training."""
        every = self._config.evaluation.every
        # What is scored after training needs not be scored beside it.
        return bool(every) and step % every == 0 and step != self._config.training.steps

    def beside(self, step: int, versions: Mapping[str, tuple[Path, int]], history: History) -> None:
        """Once a step: notes a score that has come, and begins the one that is due.

        `versions` are those of the policies that learn, folder and number; their folders are there
        when the step is due.
        """
        self._collect(0.0, history)
        if not self.due(step):
            return
        if self._beside.step is not None:
            self._progress.note(f"step {step} is not scored: step {self._beside.step} still is")
            return
        self._beside.begin(step, versions)

    def finish(self, history: History, watch: Callable[[], None]) -> None:
        """Waits for the score that is under way; gives it up after `rollouts.batch_timeout_s`.

        `watch` is called while it waits.
        """
        if self._beside.step is None:
            return
        deadline = time.monotonic() + self._config.rollouts.batch_timeout_s
        with self._progress.phase(f"waiting for the score of step {self._beside.step}", slow=True):
            while self._beside.step is not None:
                self._collect(SLICE_S, history)
                watch()
                if time.monotonic() > deadline and self._beside.step is not None:
                    limit = self._config.rollouts.batch_timeout_s
                    self._progress.note(
                        f"step {self._beside.step} is not scored: its rollouts did not end within "
                        f"{limit:g} s (rollouts.batch_timeout_s)"
                    )
                    self._beside.give_up()

    def go_back(self, step: int) -> None:
        """The run goes on from a step: a score of a later one is no longer the run's."""
        if self._beside.step is not None and self._beside.step > step:
            self._beside.give_up()

    def held(self, policy: str) -> list[int]:
        """The version that the engines beside training keep, and would start with again."""
        group = self._parts.beside.get(policy)
        return [] if group is None else [group.version]

    def _collect(self, timeout_s: float, history: History) -> None:
        step = self._beside.step
        try:
            self._note(self._beside.collect(timeout_s), history)
        except InfrastructureError as error:
            # Training needs none of it.
            self._progress.note(f"step {step} is not scored: {error}")

    def _note(self, found: Scored | None, history: History) -> None:
        if found is None:
            return
        if not any(came_to_reward(record) for record in found.records):
            self._progress.note(
                f"no held-out rollout of step {found.step} came to a reward; the first: "
                f"{why(found.records[0])}"
            )
            return
        report = self._report(found.step, found.versions, found.records)
        metrics = metrics_of(report)
        self._tracked.log_metrics(metrics, found.step)
        for row in history:
            if row["step"] == found.step:
                row |= {"heldout": report.measures["reward"].mean, **metrics}
        self._progress.note(
            f"held-out score {report.measures['reward'].mean:.3f} at step {found.step} "
            f"({in_words(found.versions)})"
        )

    def _report(
        self, step: int, versions: Mapping[str, int], records: Sequence[RolloutRecord]
    ) -> HeldoutReport:
        policy = self._config.policy.name
        return HeldoutReport.from_rewards(
            [r.outcome.rewards if came_to_reward(r) and r.outcome else None for r in records],
            policy=policy,
            version=versions[policy],
            step=step,
        )


def metrics_of(report: HeldoutReport) -> dict[str, float]:
    """A report's means as metrics, `heldout_NAME`."""
    return {f"heldout_{name}": interval.mean for name, interval in report.measures.items()}


def in_words(versions: Mapping[str, int]) -> str:
    """Versions by policy, for a line of text."""
    if len(versions) == 1:
        return f"version {next(iter(versions.values()))}"
    return ", ".join(f"{name} version {number}" for name, number in versions.items())
