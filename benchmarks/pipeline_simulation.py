"""The conductor's own admission in a clock that is not the machine's: how asynchrony scales.

Everything that decides is the real thing (`training.hand.Hand`); workers, engine and learner are
times. A rollout takes a worker, then `engine_s` of the processor, then waits for its tool, and
ends. The learner takes `learn_s` of the same processor, shared equally with whatever is sampled
then, when `shared`, as on a machine without a GPU; else it has one of its own.
"""

import heapq
import math
import random
import time
from dataclasses import dataclass

from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
)
from lightning_ray.training.hand import FlowGroup, Hand


@dataclass(frozen=True)
class Timings:
    """What a run was measured to take, seconds."""

    engine_s: float
    """Of the engine's time for one rollout, with as many beside it as in the run."""
    learn_s: float
    """Of one step: batch, learner and weights."""
    overhead_s: float
    """Of one rollout, beside its model call and its wait."""
    median_s: float
    """Of the tool's wait."""
    sigma: float
    """Standard deviation of the wait's natural logarithm."""


@dataclass(frozen=True)
class Simulated:
    """What came of it."""

    step_s: float
    """Seconds a step, in simulated time."""
    driver_s: float
    """Processor seconds a step of the real bookkeeping on this machine."""
    wakes: float
    """Times a step that the conductor was woken."""


def simulate(
    timings: Timings,
    *,
    workers: int,
    batch: int,
    samples: int,
    staleness: int,
    steps: int,
    shared: bool,
    seed: int = 0,
) -> Simulated:
    """Runs `steps` steps of `batch` groups of `samples` rollouts on so many workers."""
    chance = random.Random(seed)
    hand = Hand(batch, staleness, steps, extra_rounds=0, past_the_end=True)
    now = driver_s = 0.0
    wakes = position = trained = 0
    queued: list[RolloutSpec] = []
    free = workers
    engine_free = 0.0
    learning: float | None = None
    """When the learner is done."""
    ends: list[tuple[float, int, RolloutSpec]] = []
    known: dict[str, RolloutRecord] = {}
    """The records of those that have ended."""
    news = 0
    while trained < steps:
        begun = time.process_time()
        for _ in range(hand.room(trained) if learning is None else 0):
            name = f"g{position}"
            specs = [
                RolloutSpec(f"{name}-{n}", name, {}, 1.0, group_id=name) for n in range(samples)
            ]
            hand.add(FlowGroup(position, specs))
            queued += specs
            position += 1
        driver_s += time.process_time() - begun
        while free and queued:
            # The engine answers one after the other, in the time that each takes of it.
            spec = queued.pop(0)
            free -= 1
            slower = 2.0 if shared and learning is not None and now < learning else 1.0
            engine_free = max(engine_free, now) + timings.engine_s * slower
            wait = chance.lognormvariate(math.log(timings.median_s), timings.sigma)
            heapq.heappush(
                ends, (engine_free + timings.overhead_s + wait, len(ends) + position, spec)
            )
        # The queue wakes the conductor only when a batch can be ready, and not while it learns;
        # what ended then may be enough at once.
        if learning is None and news >= max(hand.fewest(), 1):
            begun = time.process_time()
            names = [one.rollout_id for group in hand.running for one in group.specs]
            hand.ended([known[name] for name in names if name in known])
            driver_s += time.process_time() - begun
            wakes += 1
            news = 0
        if learning is None and (not hand.running or len(hand.next_batch()) >= batch):
            begun = time.process_time()
            hand.take()
            driver_s += time.process_time() - begun
            slower = 2.0 if shared and engine_free > now else 1.0
            learning = now + timings.learn_s * slower
        if learning is not None and (not ends or learning <= ends[0][0]):
            now, learning = learning, None
            trained += 1
            continue
        now, _, spec = heapq.heappop(ends)
        free += 1
        known[spec.rollout_id] = _good(spec)
        news += 1
    return Simulated(now / steps, driver_s / steps, wakes / steps)


def _good(spec: RolloutSpec) -> RolloutRecord:
    outcome = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0})
    attempts = ((f"{spec.rollout_id}/1", AttemptStatus.SUCCEEDED),)
    return RolloutRecord(spec, RolloutStatus.SUCCEEDED, attempts, outcome)
