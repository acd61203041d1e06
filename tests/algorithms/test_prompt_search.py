"""The search: gepa's loop over candidates, on rollouts that a function makes."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.algorithms.demonstrations import Demonstrations
from lightning_ray.algorithms.prompt_config import DemonstrationsConfig, PromptConfig, Proposer
from lightning_ray.algorithms.prompt_search import Probe, Probed, PromptSearch, SearchResult
from lightning_ray.algorithms.prompts import Candidate, Exchange, Trial
from lightning_ray.errors import InfrastructureError

TASKS = [f"t{number:03d}" for number in range(60)]
SEED = Candidate("seed")


class World:
    """Rollouts that succeed the oftener the more kinds of demonstrations there are."""

    def __init__(self, seed: int = 0, lost: float = 0.0):
        self.rng = random.Random(seed)
        self.lost = lost
        self.rollouts = 0
        self.probes: list[Probe] = []

    def run(self, probes: Sequence[Probe]) -> list[list[Trial]]:
        self.probes += probes
        return [[self.trial(probe, task) for task in probe.task_ids] for probe in probes]

    def trial(self, probe: Probe, task: str) -> Trial:
        self.rollouts += 1
        if self.rng.random() < self.lost:
            return Trial(task, None)
        kinds = {asked.split()[0] for asked, _ in probe.candidate.demonstrations}
        right = self.rng.random() < 0.25 + 0.2 * len(kinds)
        kind = ("one", "two", "three")[int(task[1:]) % 3]
        return Trial(task, float(right), exchanges=(Exchange(f"{kind} of {task}", "yes"),))


def search(world: World, seed: int = 0, **settings: float) -> tuple[SearchResult, list[Probed]]:
    config = PromptConfig(**settings)  # type: ignore[arg-type]
    count = min(config.validation, len(TASKS) // 2)
    probed: list[Probed] = []
    proposer = Demonstrations(config.demonstrations, random.Random(seed))
    result = PromptSearch(
        config,
        SEED,
        train=TASKS[count:],
        validation=TASKS[:count],
        runner=world.run,
        proposer=proposer,
        random_seed=seed,
        report=probed.append,
    ).run()
    return result, probed


def test_a_search_finds_a_prompt_that_scores_better():
    result, probed = search(World())
    assert result.scored[0].candidate == SEED and result.scored[0].parent is None
    assert result.best.score > result.scored[0].score + 0.2
    assert len(result.best.candidate.demonstrations) > 1
    assert result.best.parent in {one.number for one in result.scored}
    assert result.spent == probed[-1].spent and not result.stopped_by


@settings(max_examples=20)
@given(
    st.integers(0, 99),
    st.integers(1, 10),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_the_budget_holds_and_validation_tasks_are_never_shown(
    seed, minibatch, proposals, validation, more
):
    config = {"minibatch": minibatch, "proposals": proposals, "validation": validation}
    needed = PromptConfig(**config)
    budget = needed.first_rollouts + needed.round_rollouts + more
    world = World(seed)
    result, _ = search(world, seed, **config, max_rollouts=budget)
    assert world.rollouts == result.spent <= budget
    held = {f"of {task}" for task in TASKS[:validation]}
    for probe in world.probes:
        for asked, _ in probe.candidate.demonstrations:
            assert asked.split(maxsplit=1)[1] not in held
            # Nor is a successor tried first on a task whose answer it was shown.
    numbers = {probe.candidate: probe.number for probe in world.probes}
    assert len(set(numbers.values())) == len(numbers) and numbers[SEED] == 0


def test_a_search_ends_where_its_target_is_reached():
    result, probed = search(World(), target=0.5)
    assert result.best.score >= 0.5 and probed[-1].validation
    assert all(one.score < 0.5 for one in result.scored if one is not result.best)
    assert result.spent < search(World())[0].spent


def test_a_lost_rollout_neither_helps_nor_harms():
    result, probed = search(World(lost=0.3), max_rollouts=300)
    assert all(0 <= one.score <= 1 for one in result.scored)
    last = probed[0]
    assert last.score == pytest.approx(0.25, abs=0.25)


class Writer:
    """A proposer that gives a text, or fails."""

    def __init__(self, fails_after: int):
        self.left = fails_after

    def learn(self, trials: Sequence[Trial]) -> None:
        pass

    def propose(self, parent: Candidate, trials: Sequence[Trial]) -> Candidate | None:
        self.left -= 1
        if self.left < 0:
            raise InfrastructureError("the language model is gone")
        return Candidate(parent.text + "!")


def written(fails_after: int) -> SearchResult:
    def run(probes: Sequence[Probe]) -> list[list[Trial]]:
        return [
            [Trial(task, float(len(probe.candidate.text))) for task in probe.task_ids]
            for probe in probes
        ]

    config = PromptConfig(
        proposer=Proposer.reflection, max_rollouts=200, minibatch=4, proposals=1, validation=8
    )
    writer = Writer(fails_after)
    return PromptSearch(config, SEED, TASKS[8:], TASKS[:8], run, writer, random_seed=0).run()


def test_a_proposer_that_fails_ends_the_search_with_what_was_found():
    result = written(fails_after=2)
    assert result.stopped_by == "the language model is gone"
    assert result.best.candidate.text == "seed!!" and len(result.scored) == 3


def test_rewards_may_be_on_any_scale():
    result = written(fails_after=1000)
    assert result.best.score == max(one.score for one in result.scored) > 10
    assert [one.number for one in result.scored] == list(range(len(result.scored)))


def test_a_task_may_not_both_teach_and_validate():
    config = PromptConfig(demonstrations=DemonstrationsConfig())
    twice = PromptSearch(config, SEED, TASKS[:9], TASKS[8:], World().run, Writer(0), random_seed=0)
    with pytest.raises(ValueError, match="t008"):
        twice.run()
