"""Proposals of demonstrations: exchanges of good rollouts, put before the agent's first message.

The bootstrapped few-shot method of DSPy (O. Khattab et al., "DSPy: Compiling Declarative Language
Model Calls into Self-Improving Pipelines", 2023): what the model itself did well shows it what is
wanted. It needs no stronger model, only a reward that is sometimes high.

Invariant: a demonstration never comes from a task that the proposal is about to be tried on, so a
successor cannot win by copying an answer.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_ray.algorithms.prompt_config import DemonstrationsConfig
from lightning_ray.algorithms.prompts import Candidate, Trial

Pair = tuple[str, str]

_LOOKED_AT = 8
"""Exchanges drawn for each place in a proposal; the one most unlike the others is taken."""


class Demonstrations:
    """Proposes sets of at most `config.max` exchanges; keeps every exchange that it was told of."""

    def __init__(self, config: DemonstrationsConfig, rng: random.Random):
        self._config = config
        self._rng = rng
        self._scores: list[float] = []
        self._seen: dict[Pair, tuple[float, str]] = {}
        """The best score of a rollout that held the exchange, and that rollout's task."""

    def learn(self, trials: Sequence[Trial]) -> None:
        """Keeps the exchanges of rollouts that have a score."""
        for trial in trials:
            if trial.score is None:
                continue
            self._scores.append(trial.score)
            for exchange in trial.exchanges:
                pair = (exchange.asked, exchange.said)
                if not exchange.plain or not all(text.strip() for text in pair):
                    continue
                if sum(map(len, pair)) > self._config.max_characters:
                    continue
                if pair not in self._seen or self._seen[pair][0] < trial.score:
                    self._seen[pair] = (trial.score, trial.task_id)

    def propose(self, parent: Candidate, trials: Sequence[Trial]) -> Candidate | None:
        """The parent with some exchanges more, or with one of a full set exchanged for another."""
        chosen = list(parent.demonstrations)
        pool = [pair for pair in self.pool({t.task_id for t in trials}) if pair not in chosen]
        if not pool:
            return None
        room = self._config.max - len(chosen)
        if room <= 0:
            del chosen[self._rng.randrange(len(chosen))]
            room = 1
        for _ in range(self._rng.randint(1, min(room, len(pool)))):
            drawn = self._rng.sample(pool, min(_LOOKED_AT, len(pool)))
            pair = max(
                drawn, key=lambda other: unlikeness(other[0], (asked for asked, _ in chosen))
            )
            chosen.append(pair)
            pool.remove(pair)
        return replace(parent, demonstrations=tuple(chosen))

    def pool(self, barred: set[str]) -> list[Pair]:
        """The exchanges to choose from: of the best rollouts, none of them of a `barred` task.

        Where every rollout scored the same there is no best.
        """
        if not self._scores or min(self._scores) == max(self._scores):
            return []
        ordered = sorted(self._scores, reverse=True)
        last = max(0, round(self._config.top_share * len(ordered)) - 1)
        # Of many that are equally good, all; and never the worst, however few the best are.
        least = ordered[last] if ordered[last] > ordered[-1] else ordered[0]
        return [
            pair
            for pair, (score, task_id) in self._seen.items()
            if score >= least and task_id not in barred
        ]


def unlikeness(text: str, others: Iterable[str]) -> float:
    """How far `text` is from the nearest of `others`: 0 the same words, 1 none in common.

    One minus Jaccard's index of the sets of words; numbers all count as one word, so that wordings
    differ and not the values in them.
    """
    words = _words(text)
    return min((1 - _jaccard(words, _words(other)) for other in others), default=1.0)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"\d+", "0", text.lower())))


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0
