"""Batches for a learner, as both sides take them: rows for the peer, sequences for us.

A row is one sample: a prompt and an answer. What several rows share is in each of them, as a
trainer without shared prefixes has it; our sequences are those that the trajectories of the same
rollouts come to. Every answer is learnt from in both, with the same credit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

ANSWER = 20
SAMPLES = 8
VOCABULARY = 40_000
"""Below the model's own, so that every token is an ordinary one."""


@dataclass(frozen=True)
class Work:
    """One batch."""

    rows: list[dict[str, Any]]
    """`prompt` and `answer` (token ids) and `credit`, of each sample."""
    sequences: list[dict[str, Any]]
    """`tokens`, `trainable` (where answers are) and `credit`, of each path of a rollout."""
    rows_at_a_time: int
    """How many rows the peer computes together."""

    @property
    def tokens(self) -> int:
        """Tokens as a user counts them: prompt and answer of each sample."""
        return sum(len(row["prompt"]) + len(row["answer"]) for row in self.rows)


def shared_prompt() -> Work:
    """8 samples of one 200-token prompt."""
    random = np.random.default_rng(1)
    prompt = _tokens(random, 200)
    return _single([prompt] * SAMPLES, random)


def nothing_shared() -> Work:
    """8 samples of as many prompts."""
    random = np.random.default_rng(2)
    return _single([_tokens(random, 200) for _ in range(SAMPLES)], random)


def multi_turn(rollouts: int = 2, turns: int = 8, turn: int = 100) -> Work:
    """Rollouts of several turns of so many tokens; the peer gets one row a turn."""
    random = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    sequences = []
    for number in range(rollouts):
        credit = 1.0 if number % 2 else -1.0
        history: list[int] = []
        trainable: list[bool] = []
        for _ in range(turns):
            history = history + _tokens(random, turn - ANSWER)
            answer = _tokens(random, ANSWER)
            rows.append({"prompt": list(history), "answer": answer, "credit": credit})
            history = history + answer
            trainable += [False] * (turn - ANSWER) + [True] * ANSWER
        sequences.append({"tokens": history, "trainable": trainable, "credit": credit})
    return Work(rows, sequences, rows_at_a_time=4)


WORK = {
    "shared_prompt": shared_prompt,
    "multi_turn": multi_turn,
    "nothing_shared": nothing_shared,
}


def _single(prompts: list[list[int]], random: np.random.Generator) -> Work:
    rows = [
        {"prompt": prompt, "answer": _tokens(random, ANSWER), "credit": float(random.normal())}
        for prompt in prompts
    ]
    sequences = [
        {
            "tokens": row["prompt"] + row["answer"],
            "trainable": [False] * len(row["prompt"]) + [True] * ANSWER,
            "credit": row["credit"],
        }
        for row in rows
    ]
    return Work(rows, sequences, rows_at_a_time=len(rows))


def _tokens(random: np.random.Generator, count: int) -> list[int]:
    found: list[int] = random.integers(100, VOCABULARY, count).tolist()
    return found
