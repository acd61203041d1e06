"""Which exchanges become demonstrations, and which never do."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.algorithms.demonstrations import Demonstrations, unlikeness
from lightning_ray.algorithms.prompt_config import DemonstrationsConfig
from lightning_ray.algorithms.prompts import Candidate, Exchange, Trial

SEED = Candidate("be exact")


def trial(task_id: str, score: float | None, *said: Exchange) -> Trial:
    return Trial(task_id, score, exchanges=said or (Exchange(f"what is {task_id}", "it is"),))


def proposer(seed: int = 0, **config: float) -> Demonstrations:
    return Demonstrations(DemonstrationsConfig(**config), random.Random(seed))  # type: ignore[arg-type]


trials = st.lists(
    st.builds(
        trial,
        st.sampled_from("abcdefgh"),
        st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    ),
    max_size=30,
)


@given(trials, st.sets(st.sampled_from("abcdefgh")), st.integers(1, 5), st.integers(0, 9))
def test_a_set_is_small_of_good_rollouts_and_of_no_task_at_hand(known, barred, limit, seed):
    demonstrations = proposer(seed, max=limit)
    demonstrations.learn(known)
    candidate = SEED
    scores = [t.score for t in known if t.score is not None]
    for _ in range(5):
        child = demonstrations.propose(candidate, [trial(task, 1.0) for task in barred])
        if child is None:
            break
        assert child.text == SEED.text and child != candidate
        shown = child.demonstrations
        assert 1 <= len(shown) <= limit and len(set(shown)) == len(shown)
        for pair in shown:
            sources = [t for t in known if (t.exchanges[0].asked, t.exchanges[0].said) == pair]
            assert not {t.task_id for t in sources} & barred
            assert max(t.score or 0.0 for t in sources) > min(scores)
        candidate = child


def test_where_every_rollout_scored_the_same_there_is_nothing_to_show():
    demonstrations = proposer()
    demonstrations.learn([trial(task, 0.0) for task in "abc"])
    assert demonstrations.propose(SEED, []) is None


def test_of_few_good_rollouts_only_those_are_shown_and_of_many_all():
    few, many = proposer(), proposer()
    few.learn([trial("a", 1.0), *(trial(f"bad{n}", 0.1) for n in range(40))])
    assert few.pool(set()) == [("what is a", "it is")]
    many.learn([*(trial(f"good{n}", 1.0) for n in range(20)), trial("bad", 0.0)])
    assert len(many.pool(set())) == 20


@pytest.mark.parametrize(
    "exchange",
    [
        Exchange("?", "a tool call", plain=False),
        Exchange(" ", "nothing was asked"),
        Exchange("?", ""),
        Exchange("?" * 3000, "!" * 1001),
    ],
)
def test_what_cannot_be_shown_as_text_is_not(exchange):
    demonstrations = proposer()
    demonstrations.learn([trial("a", 1.0, exchange), trial("b", 0.0)])
    assert demonstrations.propose(SEED, []) is None


def test_the_wording_most_unlike_those_shown_is_taken():
    demonstrations = proposer(max=2)
    same = [Exchange(f"What is {n} plus {n + 1}?", "calc") for n in range(3)]
    other = Exchange("How much is 3 times 4?", "calc")
    demonstrations.learn([trial("a", 1.0, *same, other), trial("b", 0.0)])
    parent = Candidate("be exact", (("What is 7 plus 8?", "calc(7 + 8)"),))
    child = demonstrations.propose(parent, [])
    assert child is not None and child.demonstrations[1] == (other.asked, other.said)


def test_numbers_make_no_difference_between_wordings():
    assert unlikeness("What is 3 plus 4?", ["what is 61 plus 9"]) == 0.0
    assert unlikeness("What is 3?", []) == 1.0
    assert 0 < unlikeness("What is 3?", ["What was 3?", "something else"]) < 1
