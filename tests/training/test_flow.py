"""Groups on their way to the learner: admitted when there is room, taken once, never too old."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.agents import Task
from lightning_ray.jobs.compose import compose_config
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    QueueClient,
    RolloutRecord,
    RolloutSpec,
    RolloutStatus,
    start_queue,
)
from lightning_ray.tracking import Progress
from lightning_ray.training import TrainConfig
from lightning_ray.training.dynamic import has_contrast
from lightning_ray.training.flow import Behind, Flow
from lightning_ray.training.hand import FlowGroup, Hand
from lightning_ray.training.order import TaskOrder


def group(position: int, samples: int) -> FlowGroup:
    name = f"g{position}"
    specs = [RolloutSpec(f"{name}-{n}", name, {}, 1.0, group_id=name) for n in range(samples)]
    return FlowGroup(position, specs)


def ended(spec: RolloutSpec, reward: float | None) -> RolloutRecord:
    good = reward is not None
    status = AttemptStatus.SUCCEEDED if good else AttemptStatus.FAILED
    outcome = AttemptOutcome(status, {"reward": reward} if good else {})
    whole = RolloutStatus.SUCCEEDED if good else RolloutStatus.FAILED
    return RolloutRecord(spec, whole, ((f"{spec.rollout_id}/1", status),), outcome)


@given(
    st.data(),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(0, 2),
    st.integers(1, 3),
    st.booleans(),
)
def test_however_rollouts_end_each_task_is_taken_once_and_no_more_is_in_hand_than_staleness_allows(
    data: st.DataObject,
    batch: int,
    staleness: int,
    steps: int,
    rounds: int,
    samples: int,
    past_the_end: bool,
) -> None:
    hand = Hand(batch, staleness, steps, rounds, past_the_end)
    rewards: dict[str, float | None] = {}
    position, trained, seen = 0, 0, []
    while trained < steps:
        for _ in range(hand.room(trained)):
            hand.add(group(position, samples))
            position += 1
        in_hand = len(hand.running) + len(hand.ready)
        assert trained * batch + in_hand <= (staleness + trained + 1) * batch
        assert in_hand <= (steps - trained) * batch or past_the_end
        if hand.running and len(hand.next_batch()) < batch:
            # Fewer endings than it says can never complete a batch.
            few = hand.fewest()
            assert few > 0
            left = [s for one in hand.running for s in one.specs if s.rollout_id in one.missing]
            gone = data.draw(st.lists(st.sampled_from(left), min_size=1, unique_by=id))
            for spec in gone:
                rewards[spec.rollout_id] = data.draw(st.sampled_from([None, 0.0, 1.0]))
            known = [s for one in hand.running for s in one.specs if s.rollout_id in rewards]
            hand.ended([ended(spec, rewards[spec.rollout_id]) for spec in known])
            if len(gone) < few:
                assert hand.running and len(hand.ready) < batch
            continue
        taken = hand.take()
        assert [one.position for one in taken] == sorted(one.position for one in taken)
        assert all(len(one.ordered) == samples for one in taken)
        contrast = sum(has_contrast(one.ordered) for one in taken)
        # Others were tried in place of those that teach nothing, as often as was allowed.
        assert len(taken) <= batch * (1 + rounds)
        assert contrast == batch or len(taken) == batch * (1 + rounds)
        seen += [one.position for one in taken]
        trained += 1
    assert hand.room(trained) == 0
    left = [one.position for one in hand.groups]
    assert len(left) <= (staleness * batch if past_the_end else 0)
    assert sorted(seen + left) == list(range(position))


class Bench:
    """A flow over a real queue, whose rollouts the test ends by hand."""

    def __init__(
        self,
        folder: Path,
        staleness: int,
        steps: int = 6,
        timeout_s: float = 60,
        past_the_end: bool = True,
    ):
        self.config: TrainConfig = compose_config(
            "train",
            TrainConfig,
            [
                "experiment=calculator",
                "training.tasks_per_step=2",
                "algorithm.group_size=2",
                f"training.staleness={staleness}",
                f"training.steps={steps}",
                f"training.past_the_end={past_the_end}",
                f"rollouts.batch_timeout_s={timeout_s}",
            ],
        )
        self.queue: QueueClient = start_queue("run", self.config.rollouts, folder)
        self.order = TaskOrder([Task(str(n), {"n": n}) for n in range(50)], 0)
        self.versions: dict[str, int] = {}
        self.flow = self.new_flow()

    def new_flow(self) -> Flow:
        return Flow(self.config, self.queue, self.order, self._oldest, Progress(1, mode="plain"))

    def _oldest(self, records: list[RolloutRecord]) -> dict[str, dict[str, int]]:
        names = {record.spec.group_id for record in records}
        return {n: {"policy": self.versions[n]} for n in names if n in self.versions}

    @staticmethod
    def behind(version: int) -> Behind:
        """Where every step published the next number."""
        return lambda older: version - older["policy"]

    def lease(self, version: int) -> list[str]:
        """Takes all that is queued, as workers would, while `version` answers."""
        taken = []
        while (lease := ray.get(self.queue.actor.dequeue.remote(0.0), timeout=30)) is not None:
            taken.append(lease.attempt_id)
            self.versions.setdefault(lease.group_id, version)
        return taken

    def end(self, attempts: list[str]) -> None:
        for number, attempt in enumerate(attempts):
            outcome = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": number % 2})
            ray.get(self.queue.actor.finish.remote(attempt, outcome), timeout=30)


@pytest.fixture
def bench(ray_cluster: None, tmp_path: Path) -> Iterator[type[Bench]]:
    made: list[Bench] = []

    class Kept(Bench):
        def __init__(self, *arguments: float, **named: float) -> None:
            super().__init__(tmp_path / str(len(made)), *arguments, **named)  # type: ignore[arg-type]
            made.append(self)

    yield Kept
    for one in made:
        ray.kill(one.queue.actor)


def test_without_staleness_the_next_rollouts_begin_when_a_step_is_done(bench: type[Bench]) -> None:
    one = bench(staleness=0)
    one.flow.admit(0)
    first = one.lease(0)
    assert len(first) == 4
    one.flow.admit(0)
    assert one.lease(0) == []
    one.end(first)
    taken = one.flow.take(0, one.behind(0))
    assert [r.spec.task_id for r in taken.records] == [
        task.id for task in one.order.take(0, 2) for _ in range(2)
    ]
    assert one.lease(0) == [], "nothing is sampled while the learner learns"
    one.flow.admit(1)
    assert len(one.lease(1)) == 4
    assert (one.flow.position, one.flow.in_hand) == (4, [2, 3])


def test_with_staleness_others_run_on_and_a_step_takes_who_is_ready_first(
    bench: type[Bench],
) -> None:
    one = bench(staleness=1)
    one.flow.admit(0)
    running = one.lease(0)
    assert len(running) == 8, "two batches are under way"
    # The first group is slow.
    one.end(running[2:6])
    taken = one.flow.take(0, one.behind(0))
    assert {r.spec.task_id for r in taken.records} == {t.id for t in one.order.take(1, 2)}
    assert one.flow.in_hand == [0, 3]
    one.flow.admit(1)
    assert one.flow.in_hand == [0, 3, 4, 5]
    # A resumed run does those first that were under way, under other names.
    again = one.new_flow()
    again.restore(one.flow.position, one.flow.in_hand)
    ray.get(one.queue.actor.begin.remote(), timeout=30)
    again.admit(1)
    later = one.lease(1)
    assert not {a.split("/")[0] for a in later} & {a.split("/")[0] for a in running}
    one.end(later[:4])
    resumed = again.take(1, one.behind(1))
    wanted = [one.order.take(place, 1)[0].id for place in (0, 3)]
    assert [r.spec.task_id for r in resumed.records[::2]] == wanted
    assert again.in_hand == [4, 5] and again.position == 6


def test_a_group_with_tokens_that_are_too_old_is_dropped_and_counted(bench: type[Bench]) -> None:
    one = bench(staleness=1)
    one.flow.admit(0)
    running = one.lease(0)
    slow = running[:2]
    one.end(running[2:6])
    one.flow.take(0, one.behind(0))
    for step in (1, 2):
        one.flow.admit(step)
        running = [*running[6:], *one.lease(step)]
        one.end(running[:4])
        assert one.flow.take(step, one.behind(step)).stale == 0
        running = ["", "", *["" for _ in range(4)], *running[4:]]
    one.flow.admit(3)
    running = [*running[6:], *one.lease(3)]
    # The slow group, of version 0, is among the first that are ready.
    one.end(slow)
    one.end(running[:2])
    done = one.queue.wait([slow[0].split("/")[0], running[1].split("/")[0]], 10)
    assert len(done) == 2
    one.end(running[2:4])
    taken = one.flow.take(3, one.behind(3))
    assert taken.stale == 1
    assert one.order.take(0, 1)[0].id not in {r.spec.task_id for r in taken.records}
    assert 0 not in one.flow.in_hand


@pytest.mark.parametrize("past_the_end", [True, False])
def test_the_last_step_waits_for_the_slowest_only_if_told_to(
    bench: type[Bench], past_the_end: bool
) -> None:
    one = bench(staleness=1, steps=2, past_the_end=past_the_end)
    one.flow.admit(0)
    running = one.lease(0)
    one.end(running[2:6])
    one.flow.take(0, one.behind(0))
    one.flow.admit(1)
    later = one.lease(1)
    assert len(later) == (4 if past_the_end else 0)
    # The first task is slow: another one's rollouts may take the place of its own.
    one.end([*running[6:], *later[:2]] if past_the_end else [*running[:2], *running[6:]])
    taken = one.flow.take(1, one.behind(1))
    places = (3, 4) if past_the_end else (0, 3)
    wanted = [one.order.take(place, 1)[0].id for place in places]
    assert [r.spec.task_id for r in taken.records[::2]] == wanted
    one.flow.admit(2)
    assert one.lease(2) == []
    assert one.flow.in_hand == ([0, 5] if past_the_end else [])
    assert one.flow.abandon() == (2 if past_the_end else 0)


def test_what_does_not_end_in_time_is_cancelled_and_the_step_goes_on(bench: type[Bench]) -> None:
    one = bench(staleness=0, timeout_s=1)
    one.flow.admit(0)
    running = one.lease(0)
    one.end(running[:3])
    taken = one.flow.take(0, one.behind(0))
    assert (
        sorted(record.status.value for record in taken.records) == ["cancelled"] + ["succeeded"] * 3
    )


def test_who_waits_for_some_is_woken_by_as_many(bench: type[Bench]) -> None:
    one = bench(staleness=0)
    one.flow.admit(0)
    running = one.lease(0)
    names = [attempt.split("/")[0] for attempt in running]
    asking = one.queue.actor.wait.remote(names, 30.0, 2)
    one.end(running[:1])
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(asking, timeout=1)
    one.end(running[1:2])
    assert [r.spec.rollout_id for r in ray.get(asking, timeout=10)] == names[:2]
