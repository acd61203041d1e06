"""One policy that learns: its batch of a step, its learner's step, and the version that it makes.

Several learn from the same rollouts, each from the tokens that it sampled itself, by its own
algorithm and credit, and each counts its own versions.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from lightning_ray.algorithms import make_algorithm, own_loss
from lightning_ray.errors import InfrastructureError, PartLostError, UserError
from lightning_ray.learner import StepReport
from lightning_ray.policies import PolicyConfig
from lightning_ray.policies.handover import Way, shortest_way
from lightning_ray.rollouts import RolloutRecord
from lightning_ray.training.batches import Batch
from lightning_ray.training.config import TrainConfig, settings_of
from lightning_ray.training.parts import Parts
from lightning_ray.training.shipping import ship_by_value
from lightning_ray.training.state import PolicyState
from lightning_ray.training.versions import PUBLISH_TIMEOUT_S, Versions

log = logging.getLogger(__name__)

BATCH_TIMEOUT_S = 300.0
ASK_AGAIN_S = 1.0


@dataclass
class Lesson:
    """What one policy learns from in a step, and what came of it."""

    sequences: "ray.ObjectRef"
    """The batch's table, which does not pass through this process."""
    batch: Batch
    report: StepReport | None = None
    """None when nothing was left to learn from."""
    behind: int = 0
    """Updates of the weights between its oldest token and these weights."""

    @property
    def learnt(self) -> bool:
        """Whether the weights changed."""
        return self.report is not None and self.report.skipped is None

    def metrics(self) -> dict[str, float]:
        """Of this policy alone."""
        batch = self.batch
        return {
            **({} if self.report is None else self.report.metrics()),
            **batch.hygiene.metrics(),
            "staleness": float(self.behind),
            "groups_used": float(batch.used_groups),
            "groups_flat": float(batch.flat_groups),
            "groups_small": float(batch.small_groups),
            "cut_calls": float(batch.cut.calls),
            "cut_tokens": float(batch.cut.tokens),
            "left_out": float(batch.left_out),
            "sampled_tokens": float(batch.report.trainable_tokens),
        }


class Trainee:
    """A policy that learns, with its algorithm and its parts."""

    def __init__(self, config: TrainConfig, policy: PolicyConfig, parts: Parts, versions: Versions):
        self.name = policy.name
        self._config = config
        self._own = settings_of(config, policy)
        self._parts = parts
        self._versions = versions
        self._algorithm = make_algorithm(self._own.algorithm)
        ship_by_value(self._algorithm)
        self._unsettled: tuple[int, int, int, str] | None = None
        """Of a version that may not lie on disk yet: number, parent, step, checksum."""
        self.has_gpus = self._own.learner.num_gpus > 0

    def register_base(self) -> None:
        """Enters the base model as version 0."""
        self._versions.register(0, self._parts.base(self.name), None, 0, "base model")

    def lesson(self, records: Sequence[RolloutRecord], spans: Any, heldout: Any) -> Lesson:
        """What the policy learns from in a step.

        `spans` are those of the records' attempts, or a reference to them; `heldout` is told to
        the checks (see `make_batch`). Raises InfrastructureError when no batch is built, UserError
        when the algorithm cannot score a group.
        """

        def ask() -> list["ray.ObjectRef"]:
            asked: list[ray.ObjectRef] = self._parts.batches.make.options(num_returns=2).remote(
                list(records),
                spans,
                self._algorithm,
                self.name,
                self._config.hygiene,
                heldout,
                self._own.algorithm,
                self._own.credit,
                self._config.training.max_sequence_tokens,
            )
            return asked

        (sequences, _), batch = built(ask, "the step's batch was not built")
        return Lesson(sequences, batch)

    def learn(self, lesson: Lesson, state: PolicyState) -> None:
        """One learner step on the lesson's batch, whose report it gets, if there is any to learn.

        Raises PartLostError when the learner is lost.
        """
        batch = lesson.batch
        if batch.rows:
            lesson.report = self._parts.learners[self.name].step(
                lesson.sequences,
                self._algorithm.loss,
                self._config.training.step_timeout_s,
                own_loss(self._algorithm),
            )
        # Before the next version: these weights, and not those, were trained.
        oldest = state.version if batch.oldest_version is None else batch.oldest_version
        lesson.behind = state.behind(oldest)

    def publish(self, state: PolicyState, step: int, mend: Callable[[], None]) -> None:
        """Makes the learner's weights the next version, and hands it to the engines.

        It is registered when it lies on disk (`settle`), which goes on meanwhile. `mend` is called
        between the two: what died meanwhile is replaced first.
        """
        self.settle()
        number = self._versions.next(state.version)
        path = self._versions.path(number)
        handed = self._parts.learners[self.name].hand_over(path, self._way(), PUBLISH_TIMEOUT_S)
        self._unsettled = (number, state.version, step, handed.digest)
        mend()
        by_store = self._config.training.weights is Way.object_store
        try:
            self._parts.groups[self.name].update_weights(
                str(path), number, handed=handed, by_store=by_store
            )
        except InfrastructureError:
            # Weights that lay in the memory of a learner are gone with it: then it is that that
            # was lost, which this says.
            self._parts.learners[self.name].settle(PUBLISH_TIMEOUT_S)
            raise
        self._parts.learners[self.name].taken(handed)
        state.version = number
        state.published.append(number)

    def settle(self) -> None:
        """Waits until the newest version lies on disk, and registers it.

        Raises PartLostError when the learner died before, InfrastructureError when it cannot be
        written.
        """
        if self._unsettled is None:
            return
        number, parent, step, digest = self._unsettled
        if not self._written():
            self._parts.learners[self.name].settle(PUBLISH_TIMEOUT_S)
        self._unsettled = None
        made_by = self._own.algorithm.name
        self._versions.register(number, self._versions.path(number), parent, step, made_by, digest)

    def _written(self) -> bool:
        """Whether the newest version lies on disk, whole."""
        return self._unsettled is None or self._versions.path(self._unsettled[0]).is_dir()

    def give_up(self) -> None:
        """Drops what a learner that died had not written; its number stays taken."""
        if self._parts.learners[self.name].lost and not self._written():
            # With several ranks others of them may be stuck in what the dead one left.
            self._unsettled = None
        try:
            self.settle()
        except PartLostError as error:
            log.info("version %s was lost: %s", self._unsettled, error)
            self._unsettled = None

    def clear_up(self) -> None:
        """Frees what versions take that were never written whole, or never registered."""
        self._versions.clear_up()

    def standing(self, state: PolicyState) -> tuple[Path, int]:
        """The version that the run stands at: where its weights lie or will lie, and its number."""
        version = state.version
        return (self._versions.path(version) if version else self._parts.base(self.name)), version

    def hand_over(self, state: PolicyState) -> None:
        """Has the engines answer with the version that the run stands at, again."""
        weights, version = self.standing(state)
        self._parts.groups[self.name].update_weights(str(weights), version)

    def prune(self, needed: set[int]) -> None:
        """Removes the weights of old versions, but for those `needed`."""
        self._versions.prune(needed)

    def _way(self) -> Way:
        """How weights travel. Asked each time: what dies may come back on another node."""
        chosen = self._config.training.weights
        if chosen not in (Way.auto, Way.gpu_memory):
            return chosen
        learner, group = self._parts.learners[self.name], self._parts.groups[self.name]
        gpus = (learner.gpu(), group.gpus()) if self.has_gpus else ("", set[str]())
        found = shortest_way(learner.node(), group.nodes(), *gpus)
        if chosen is Way.gpu_memory and found is not chosen:
            log.warning("not every engine of %s is on its learner's GPU: by %s", self.name, found)
        return found

    def sample(self, lesson: Lesson, count: int) -> pa.Table:
        """The first `count` sequences of a lesson."""
        table: pa.Table = ray.get(lesson.sequences, timeout=BATCH_TIMEOUT_S)
        return table.slice(0, count)


def built(ask: Callable[[], list["ray.ObjectRef"]], what: str) -> tuple[list["ray.ObjectRef"], Any]:
    """Asks the batch maker; returns the references, and what the last of them stands for.

    While it is being restarted it is asked again, for `BATCH_TIMEOUT_S` in all. Raises
    InfrastructureError, beginning with `what`.
    """
    deadline = time.monotonic() + BATCH_TIMEOUT_S
    while True:
        asked = ask()
        try:
            return asked, ray.get(asked[-1], timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"{what} within {BATCH_TIMEOUT_S:g} s") from error
        except (
            ray.exceptions.ActorUnavailableError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            if time.monotonic() > deadline:
                raise InfrastructureError(f"{what}: {error}") from error
            log.info("the batch maker is not there; asking again: %s", error)
            time.sleep(ASK_AGAIN_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise InfrastructureError(f"{what}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise InfrastructureError(f"{what}: {error}") from error
