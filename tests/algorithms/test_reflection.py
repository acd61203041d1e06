"""What a language model is told of rollouts, and what is taken from its answer."""

import pytest

from lightning_ray.algorithms.prompts import Candidate, Exchange, Trial
from lightning_ray.algorithms.reflection import Reflection

SEED = Candidate("Be brief.", (("a", "b"),))
TRIAL = Trial(
    "t1",
    0.1,
    {"question": "What is 1 plus 1?", "answer": 2},
    {"reward": 0.1, "exact": 0.0},
    (Exchange("What is 1 plus 1?", "calc(1 * 1)"),),
    "calc(1 * 1) = 1",
    "a warning",
)


def test_a_language_model_sees_prompt_inputs_outputs_and_feedback():
    seen: list[str] = []

    def ask(prompt: str) -> str:
        seen.append(prompt)
        return "Thinking ...\n```text\nAdd, never multiply.\n```\nDone."

    child = Reflection(ask).propose(SEED, [TRIAL, Trial("t2", None)])
    assert child == Candidate("Add, never multiply.", SEED.demonstrations)
    (prompt,) = seen
    for part in ("Be brief.", "What is 1 plus 1?", "calc(1 * 1)", "reward 0.1", "exact 0"):
        assert part in prompt
    assert "calc(1 * 1) = 1" in prompt and "a warning" in prompt and '"answer": 2' in prompt
    assert prompt.count("# Example ") == 1


@pytest.mark.parametrize("answer", ["```\n\n```", "   "])
def test_an_answer_without_a_prompt_proposes_nothing(answer):
    assert Reflection(lambda prompt: answer).propose(SEED, [TRIAL]) is None


def test_where_every_rollout_was_lost_nobody_is_asked():
    def ask(prompt: str) -> str:
        raise AssertionError("asked")

    assert Reflection(ask).propose(SEED, [Trial("t1", None)]) is None


def test_long_texts_are_cut():
    long = Trial("t", 0.0, {}, {"reward": 0.0}, (Exchange("x" * 9000, "y" * 9000),))
    seen: list[str] = []
    Reflection(lambda prompt: seen.append(prompt) or "new").propose(SEED, [long])
    assert len(seen[0]) < 7000
