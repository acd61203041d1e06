"""The search for a better prompt: GEPA's loop over candidates that our rollouts score.

gepa keeps the candidates, chooses the parent from the Pareto front over validation tasks, and
decides which successor goes on. Ours are: how a candidate is run (`Runner`), who writes successors
(`PromptProposer`), and what a lost rollout counts.

Invariant: a candidate has one number, 0 for the agent's own prompt, in the order in which they were
proposed. A rollout that a fault lost counts as the mean of the others under the same candidate: it
neither helps nor harms. The budget is never exceeded.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gepa
from gepa.core.adapter import EvaluationBatch
from gepa.core.result import GEPAResult
from gepa.strategies.proposal_sampling import ProposalTask
from gepa.strategies.proposal_selection import BestImprovement

from lightning_ray.algorithms.prompt_config import PromptConfig, Proposer
from lightning_ray.algorithms.prompts import Candidate, PromptProposer, Trial
from lightning_ray.errors import LightningRayError

Texts = dict[str, str]
Batch = EvaluationBatch[Trial, str]
_TEXT, _SHOWN = "text", "demonstrations"


@dataclass(frozen=True)
class Probe:
    """A candidate to be tried on tasks."""

    number: int
    candidate: Candidate
    parent: int | None
    """The number of the one that it was made from; None for the agent's own prompt."""
    task_ids: tuple[str, ...]


Runner = Callable[[Sequence[Probe]], list[list[Trial]]]
"""Runs every task of every probe side by side; a list of trials per probe, in the tasks' order."""


@dataclass(frozen=True)
class Probed:
    """What a try came to."""

    probe: Probe
    score: float
    """Mean over the rollouts that have one; 0 where none has."""
    validation: bool
    """Whether it was on the validation tasks."""
    spent: int
    """Rollouts of the search so far."""


@dataclass(frozen=True)
class Scored:
    """A candidate that went on to the validation tasks."""

    number: int
    candidate: Candidate
    parent: int | None
    """None for the agent's own prompt."""
    score: float
    """Mean over the validation tasks."""


@dataclass
class SearchResult:
    """What a search came to."""

    scored: list[Scored]
    """The agent's own prompt first."""
    best: Scored
    """Of the highest score; the earliest where several have it."""
    spent: int
    """Rollouts."""
    stopped_by: str = ""
    """Why it ended before its budget did; empty when it did not."""


@dataclass
class PromptSearch:
    """One search from the prompt `seed`; `run` makes it, once."""

    config: PromptConfig
    seed: Candidate
    train: Sequence[str]
    """Ids of the tasks that prompts are compared on, and demonstrations taken from."""
    validation: Sequence[str]
    """Ids of the tasks that they are scored on; none of them in `train`."""
    runner: Runner
    proposer: PromptProposer
    random_seed: int
    report: Callable[[Probed], None] = lambda probed: None
    """Told of every probe as it ends."""
    log: Callable[[str], None] = lambda line: None
    """Told what gepa says."""
    _numbers: dict[Candidate, int] = field(default_factory=dict)
    _parents: dict[int, int | None] = field(default_factory=dict)
    _spent: int = 0
    _reached: bool = False
    _fault: LightningRayError | None = None

    def run(self) -> SearchResult:
        """Searches until the budget is spent or the target is reached.

        A proposer's LightningRayError ends the search with what was found so far. Raises what
        the runner raises.
        """
        if both := set(self.train) & set(self.validation):
            raise ValueError(f"tasks both to learn from and to validate on: {sorted(both)[:3]}")
        self._number(self.seed, None)
        rng = random.Random(self.random_seed)
        if self.config.proposer is Proposer.demonstrations:
            count = min(self.config.demonstrations.bootstrap, len(self.train))
            self._probe([Probe(0, self.seed, None, tuple(rng.sample(list(self.train), count)))])
        found: GEPAResult[str, int] = gepa.optimize(
            seed_candidate=_texts(self.seed),
            trainset=list(self.train),
            valset=list(self.validation),
            adapter=self,  # type: ignore[arg-type]
            skip_perfect_score=False,
            reflection_minibatch_size=min(self.config.minibatch, len(self.train)),
            sampling_strategy=_OneBatch(self.config.proposals),
            selection_strategy=BestImprovement(),
            module_selector=self._component,  # type: ignore[arg-type]
            stop_callbacks=lambda state: self._enough(),
            logger=self,
            seed=self.random_seed,
        )
        scored = []
        for texts, score in zip(found.candidates, found.val_aggregate_scores, strict=True):
            candidate = _candidate(texts)
            number = self._numbers[candidate]
            scored.append(Scored(number, candidate, self._parents[number], score))
        best = max(scored, key=lambda one: (one.score, -one.number))
        stopped = "" if self._fault is None else str(self._fault)
        return SearchResult(scored, best, self._spent, stopped)

    # What gepa asks of an adapter.

    def evaluate(self, batch: list[str], candidate: Texts, capture_traces: bool = False) -> Batch:
        """Runs one candidate."""
        return self.batch_evaluate([(candidate, batch)])[0]

    def batch_evaluate(self, items: list[tuple[Texts, list[str]]]) -> list[Batch]:
        """Runs several candidates side by side."""
        probes = []
        for texts, task_ids in items:
            candidate = _candidate(texts)
            number = self._numbers[candidate]
            probes.append(Probe(number, candidate, self._parents[number], tuple(task_ids)))
        return [
            EvaluationBatch([t.printed for t in trials], _scores(trials), list(trials))
            for trials in self._probe(probes)
        ]

    def make_reflective_dataset(
        self, candidate: Texts, eval_batch: Batch, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """The trials themselves: what they are told as is the proposer's affair."""
        trials = eval_batch.trajectories or []
        return {name: [{"trial": trial} for trial in trials] for name in components_to_update}

    def propose_new_texts(
        self,
        candidate: Texts,
        reflective_dataset: dict[str, list[dict[str, Any]]],
        components_to_update: list[str],
    ) -> Texts:
        """A successor's texts where they differ; empty for none, or one that was tried before."""
        if self._fault is not None:
            return {}
        parent = _candidate(candidate)
        trials = [record["trial"] for record in reflective_dataset[components_to_update[0]]]
        try:
            child = self.proposer.propose(parent, trials)
        except LightningRayError as error:
            # gepa would log it and go on for ever: it is kept, and ends the search.
            self._fault = error
            return {}
        if child is None or child in self._numbers:
            return {}
        self._number(child, self._numbers[parent])
        return {name: text for name, text in _texts(child).items() if text != candidate[name]}

    # Ours.

    def _number(self, candidate: Candidate, parent: int | None) -> None:
        number = len(self._numbers)
        self._numbers[candidate] = number
        self._parents[number] = parent

    def _probe(self, probes: Sequence[Probe]) -> list[list[Trial]]:
        results = self.runner(probes)
        validation = set(self.validation)
        for probe, trials in zip(probes, results, strict=True):
            self._spent += len(trials)
            validating = bool(validation.intersection(probe.task_ids))
            if not validating:
                self.proposer.learn(trials)
            scores = [trial.score for trial in trials if trial.score is not None]
            mean = sum(scores) / len(scores) if scores else 0.0
            target = self.config.target
            self._reached |= validating and target is not None and mean >= target
            self.report(Probed(probe, mean, validating, self._spent))
        return results

    def _enough(self) -> bool:
        left = self.config.max_rollouts - self._spent
        return self._reached or self._fault is not None or left < self.config.round_rollouts

    def _component(self, *_: object) -> list[str]:
        return [_SHOWN if self.config.proposer is Proposer.demonstrations else _TEXT]


class _OneBatch:
    """Several successors of one parent, all compared with it on the same minibatch."""

    def __init__(self, count: int):
        self._count = count

    def sample_tasks(
        self, state: Any, candidate_selector: Any, batch_sampler: Any, trainset: Any
    ) -> list[ProposalTask[Any, Any]]:
        parent = candidate_selector.select_candidate_idx(state)
        ids = batch_sampler.next_minibatch_ids(trainset, state)
        texts = state.program_candidates[parent]
        return [ProposalTask(parent, texts, ids, trainset.fetch(ids)) for _ in range(self._count)]


def _scores(trials: Sequence[Trial]) -> list[float]:
    known = [trial.score for trial in trials if trial.score is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [mean if trial.score is None else trial.score for trial in trials]


def _texts(candidate: Candidate) -> Texts:
    """A candidate as gepa keeps it: named texts."""
    return {_TEXT: candidate.text, _SHOWN: json.dumps(candidate.demonstrations)}


def _candidate(texts: Texts) -> Candidate:
    shown = tuple((user, assistant) for user, assistant in json.loads(texts[_SHOWN]))
    return Candidate(texts[_TEXT], shown)
