"""Held-out scores while training goes on, of a version that engines of their own keep meanwhile.

Invariant: every rollout of one score is answered by the version of one step, whatever training has
published since; and training waits for none of it.
"""

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lightning_ray.agents import Task
from lightning_ray.errors import InfrastructureError
from lightning_ray.rollouts import RolloutRecord, RolloutSpec
from lightning_ray.training.config import TrainConfig
from lightning_ray.training.names import MEASURING
from lightning_ray.training.parts import Parts, beside
from lightning_ray.training.rolling import rollout_specs
from lightning_ray.training.threads import begin

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
    """Done when the engines have the version and the rollouts are queued."""
    given_up: threading.Event


class Beside:
    """Scores one version after the other; one thread calls it."""

    def __init__(self, config: TrainConfig, parts: Parts, heldout: Sequence[Task]):
        self._config = config
        self._parts = parts
        self._heldout = heldout
        self._pending: _Pending | None = None

    @property
    def step(self) -> int | None:
        """The step whose version is being scored, if there is one."""
        return None if self._pending is None else self._pending.step

    def begin(self, step: int, versions: Mapping[str, tuple[Path, int]]) -> None:
        """Begins to score the versions of a step, by policy the folder and the number.

        The folders must be there. Does not wait: engines take on the weights and rollouts are
        queued by a thread.
        """
        specs = rollout_specs(
            f"{MEASURING}-b{step:05d}",
            # A step that is scored once more, after the run went back, has other rollouts.
            secrets.token_hex(3),
            self._heldout,
            self._config.evaluation.samples_per_task,
            self._config,
            heldout=True,
        )
        answered_by = {policy: beside(policy) for policy in versions}
        # Steps that wait for their rollouts come first.
        specs = [replace(one, answered_by=answered_by, priority=one.priority - 1) for one in specs]
        numbers = {policy: number for policy, (_, number) in versions.items()}
        given_up = threading.Event()
        begun = begin(partial(self._begin, specs, versions, given_up), "beside")
        self._pending = _Pending(step, numbers, specs, begun, given_up)

    def collect(self, timeout_s: float = 0.0) -> Scored | None:
        """What was scored, once all of its rollouts have ended; waits at most so long for it.

        Raises InfrastructureError when the engines did not take on the version; it is then not
        scored.
        """
        if self._pending is None:
            return None
        pending = self._pending
        deadline = time.monotonic() + timeout_s
        try:
            pending.begun.result(timeout_s)
        except TimeoutError:
            return None
        except InfrastructureError:
            self._pending = None
            raise
        names = [spec.rollout_id for spec in pending.specs]
        records = self._parts.queue.wait(names, max(0.0, deadline - time.monotonic()))
        if len(records) < len(names):
            return None
        self._parts.queue.forget(names)
        self._pending = None
        return Scored(pending.step, pending.versions, records)

    def give_up(self) -> None:
        """Cancels the score that is under way, whose rollouts then count for nothing."""
        if self._pending is None:
            return
        self._pending.given_up.set()
        if self._pending.begun.done():
            names = [spec.rollout_id for spec in self._pending.specs]
            self._parts.queue.cancel(names)
            self._parts.queue.wait(names, CANCEL_S)
            self._parts.queue.forget(names)
        self._pending = None

    def _begin(
        self,
        specs: Sequence[RolloutSpec],
        versions: Mapping[str, tuple[Path, int]],
        given_up: threading.Event,
    ) -> None:
        for policy, (folder, number) in versions.items():
            self._parts.beside[policy].update_weights(str(folder), number)
        if not given_up.is_set():
            self._parts.queue.enqueue(specs)
