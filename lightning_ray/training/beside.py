"""Held-out scores while training goes on, of a version that engines of their own keep meanwhile.

Invariant: every rollout of one score is answered by the version of one step, whatever training has
published since; and training waits for none of it.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_ray.agents import Task
from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts import RolloutRecord, RolloutSpec
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.names import MEASURING
from lightning_ray.training.parts import Parts, beside
from lightning_ray.training.rolling import rollout_specs

log = logging.getLogger(__name__)

CANCEL_S = 30.0


@dataclass(frozen=True)
class Scored:
    """The rollouts of one score, all ended."""

    step: int
    versions: Mapping[str, int]
    """Of the policies that learn."""
    records: list[RolloutRecord]


@dataclass
class _Pending:
    step: int
    versions: Mapping[str, int]
    specs: Sequence[RolloutSpec]
    begun: "Future[None]"


class Beside:
    """Scores one version after the other; one thread calls it."""

    def __init__(self, config: TrainConfig, parts: Parts, heldout: Sequence[Task]):
        self._config = config
        self._parts = parts
        self._heldout = heldout
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._pending: _Pending | None = None
        # Rollouts of a step that is done again must not be taken for the first ones.
        self._session = secrets.token_hex(3)

    @property
    def busy(self) -> bool:
        """Whether a version is being scored."""
        return self._pending is not None

    def begin(self, step: int, versions: Mapping[str, tuple[Path, int]]) -> None:
        """Begins to score the versions of a step, by policy the folder and the number.

        Does not wait: engines take on the weights and rollouts are queued by a thread.
        """
        specs = rollout_specs(
            f"{MEASURING}-b{step:05d}",
            self._session,
            self._heldout,
            self._config.evaluation.samples_per_task,
            self._config,
            heldout=True,
        )
        answered_by = {policy: beside(policy) for policy in versions}
        # Steps that wait for their rollouts come first.
        specs = [replace(one, answered_by=answered_by, priority=one.priority - 1) for one in specs]
        numbers = {policy: number for policy, (_, number) in versions.items()}
        begun = self._pool.submit(self._begin, specs, versions)
        self._pending = _Pending(step, numbers, specs, begun)

    def collect(self, timeout_s: float = 0.0) -> Scored | None:
        """What was scored, once all of its rollouts have ended; waits at most so long for it.

        Raises InfrastructureError when the engines did not take on the version.
        """
        if self._pending is None:
            return None
        pending = self._pending
        if not timeout_s and not pending.begun.done():
            return None
        try:
            pending.begun.result(timeout_s or None)
        except TimeoutError:
            return None
        names = [spec.rollout_id for spec in pending.specs]
        records = self._parts.queue.wait(names, timeout_s)
        if len(records) < len(names):
            return None
        self._parts.queue.forget(names)
        self._pending = None
        return Scored(pending.step, pending.versions, records)

    def give_up(self) -> Scored | None:
        """Cancels what has not ended; returns the rest, or None where nothing was under way."""
        if self._pending is None:
            return None
        self._parts.queue.cancel([spec.rollout_id for spec in self._pending.specs])
        found = self.collect(CANCEL_S)
        if found is None:
            raise InfrastructureError(
                f"the held-out rollouts of step {self._pending.step} did not end within "
                f"{CANCEL_S:g} s after they were cancelled"
            )
        return found

    def _begin(
        self, specs: Sequence[RolloutSpec], versions: Mapping[str, tuple[Path, int]]
    ) -> None:
        for policy, (folder, number) in versions.items():
            self._parts.beside[policy].update_weights(str(folder), number)
        self._parts.queue.enqueue(specs)
