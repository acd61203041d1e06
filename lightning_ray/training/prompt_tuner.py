"""The tuner: runs a search for a better system prompt, with rollouts of the unmodified agent.

It finds the agent's own prompt in a rehearsal, scores it on held-out tasks, lets the search try
candidates (the gateway puts them in place, several at a time), and scores the best on the same
held-out tasks.

Invariant: held-out tasks are run before and after the search, never in it. Number 0 is the agent's
own prompt, for which nothing is put in place.
"""

import json
import math
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_ray.agents import Task
from lightning_ray.algorithms.prompt_config import Proposer
from lightning_ray.algorithms.prompt_search import Probe, Probed, PromptSearch, SearchResult
from lightning_ray.algorithms.prompts import Candidate, PromptProposer, Trial
from lightning_ray.errors import UserError
from lightning_ray.evaluation import HeldoutReport, Interval, paired_difference
from lightning_ray.gateway import make_roles
from lightning_ray.policies import PromptVersion
from lightning_ray.rollouts import RolloutRecord
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.training.exchanges import as_trials, cost_usd, find_seed
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.order import TaskOrder
from lightning_ray.training.parts import Parts
from lightning_ray.training.prompt_job import OptimizePromptConfig, split_tasks
from lightning_ray.training.rehearsal import REHEARSED_TASKS, check_rehearsal, why
from lightning_ray.training.rolling import (
    came_to_reward,
    note_failures,
    rollout_specs,
    run_rollouts,
)


@dataclass(frozen=True)
class HeldoutScore:
    """One prompt on the held-out tasks."""

    report: HeldoutReport
    rewards: tuple[float, ...]
    """Per task, the mean of its samples; NaN where none came to a reward."""


class PromptTuner:
    """One search; `rehearse` first."""

    def __init__(
        self,
        config: OptimizePromptConfig,
        folder: RunFolder,
        parts: Parts,
        tracked: TrackedRun,
        progress: Progress,
        tasks: Sequence[Task],
        heldout: Sequence[Task],
    ):
        self._config = config
        self._parts = parts
        self._tracked = tracked
        self._progress = progress
        self._tasks = {task.id: task for task in tasks}
        self._order = TaskOrder(tasks, config.seed)
        self._heldout = list(heldout)
        self._log = folder.path / "search.log"
        self._session = secrets.token_hex(3)
        self._batches = 0
        self._rounds = 0
        self._tried: set[int] = set()
        self._best = -math.inf
        self.seed = ""
        """The agent's own prompt, or the part of it that is replaced."""
        self.history: list[dict[str, Any]] = []
        """Every candidate's every try, in order."""
        self.cost_usd = 0.0
        """What upstreams took for all rollouts so far."""

    @property
    def policy(self) -> str:
        """Whose prompt it is."""
        return self._config.policy.name

    def rehearse(self) -> None:
        """Runs a few tasks, and finds the prompt in them. Raises UserError for what cannot work."""
        count = min(REHEARSED_TASKS, len(self._tasks))
        specs = rollout_specs(
            "rehearsal", self._session, self._order.take(0, count), 1, self._config
        )
        with self._progress.phase("rehearsing", slow=True):
            records, spans = self._roll([replace(spec, note_messages=True) for spec in specs])
        names = list(self._config.policies)
        roles = make_roles(self._config.gateway, self.policy, names)
        idle = check_rehearsal(records, spans, roles, [self.policy])
        if idle is not None:
            raise UserError(idle)
        self.seed = find_seed(spans, self.policy, self._config.prompt.seed)
        if not self.seed and self._config.prompt.proposer is Proposer.reflection:
            raise UserError(
                f"the calls for policy {self.policy} have no system prompt to reflect on; use "
                "prompt=demonstrations, or give the agent one"
            )
        shown = " ".join(self.seed.split())
        self._progress.note(f"the agent's own prompt: {shown[:200]!r}" if shown else "no prompt")

    def score(self, number: int, candidate: Candidate) -> HeldoutScore | None:
        """A prompt on the held-out tasks; None when there are none."""
        if not self._heldout:
            return None
        samples = self._config.evaluation.samples_per_task
        specs = rollout_specs(
            f"heldout-v{number:04d}",
            self._session,
            self._heldout,
            samples,
            self._config,
            heldout=True,
        )
        prompts = self._prompts(number, candidate)
        with self._progress.phase(f"scoring prompt version {number}", slow=True):
            records, _ = self._roll([replace(spec, prompts=prompts) for spec in specs])
        if not any(came_to_reward(record) for record in records):
            raise UserError(f"no held-out rollout came to a reward; the first: {why(records[0])}")
        rewards = [_rewards(record) for record in records]
        report = HeldoutReport.from_rewards(rewards, policy=self.policy, version=number, step=0)
        values = [math.nan if row is None else row["reward"] for row in rewards]
        groups = [values[at : at + samples] for at in range(0, len(values), samples)]
        return HeldoutScore(report, tuple(_mean(group) for group in groups))

    def search(self, proposer: PromptProposer) -> SearchResult:
        """Searches for a better prompt. Raises InfrastructureError when a part is lost."""
        config = self._config
        ids = list(self._tasks)
        random.Random(config.seed).shuffle(ids)
        count = split_tasks(len(ids), config.prompt.validation)
        return PromptSearch(
            config.prompt,
            Candidate(self.seed),
            train=ids[count:],
            validation=ids[:count],
            runner=self._run,
            proposer=proposer,
            random_seed=config.seed,
            report=self._note,
            log=self._write,
        ).run()

    def version(self, number: int, candidate: Candidate) -> PromptVersion:
        """A candidate as what the gateway puts in place, and the registry keeps."""
        return PromptVersion(
            self.policy, number, self.seed, candidate.text, candidate.demonstrations
        )

    def _prompts(self, number: int, candidate: Candidate) -> tuple[PromptVersion, ...]:
        return () if number == 0 else (self.version(number, candidate),)

    def _run(self, probes: Sequence[Probe]) -> list[list[Trial]]:
        """Runs candidates side by side."""
        self._batches += 1
        specs = []
        for place, probe in enumerate(probes):
            prompts = self._prompts(probe.number, probe.candidate)
            tasks = [self._tasks[task_id] for task_id in probe.task_ids]
            prefix = f"b{self._batches:04d}-{place}-v{probe.number:04d}"
            made = rollout_specs(prefix, self._session, tasks, 1, self._config)
            specs += [replace(spec, prompts=prompts, note_messages=True) for spec in made]
        with self._progress.phase("rollouts"):
            records, spans = self._roll(specs)
        trials = as_trials(records, spans, self.policy, self.seed)
        results = []
        for probe in probes:
            count = len(probe.task_ids)
            mine, trials = trials[:count], trials[count:]
            self._require_usable(probe, mine)
            results.append(mine)
        fresh = [probe.number not in self._tried and probe.number > 0 for probe in probes]
        self._tried.update(probe.number for probe in probes)
        if any(fresh):
            self._end_round([t for t, new in zip(results, fresh, strict=True) if new])
        return results

    def _roll(self, specs: Sequence[Any]) -> tuple[list[RolloutRecord], Any]:
        """Runs rollouts; returns their records and the spans of their latest attempts."""
        limit = self._config.rollouts.batch_timeout_s
        records = run_rollouts(self._parts.queue, specs, limit, self._progress, self._parts.mend)
        note_failures(records, self._progress)
        spans = self._parts.store.get([r.attempt_id for r in records if r.attempts])
        self.cost_usd += cost_usd(spans)
        return records, spans

    def _require_usable(self, probe: Probe, trials: Sequence[Trial]) -> None:
        usable = sum(trial.score is not None for trial in trials)
        if usable < self._config.prompt.min_usable * len(trials) or not usable:
            raise UserError(
                f"only {usable} of {len(trials)} rollouts under prompt version {probe.number} came "
                f"to a reward (prompt.min_usable={self._config.prompt.min_usable})"
            )

    def _note(self, probed: Probed) -> None:
        """Keeps and shows what a try came to."""
        probe = probed.probe
        part = "validation" if probed.validation else "minibatch"
        self.history.append(
            {
                "version": probe.number,
                "parent": probe.parent,
                "part": part,
                "score": probed.score,
                "rollouts": len(probe.task_ids),
                "spent": probed.spent,
                "text": probe.candidate.text,
                "demonstrations": [list(pair) for pair in probe.candidate.demonstrations],
            }
        )
        metrics = {f"{part}_score": probed.score, "version": float(probe.number)}
        if probed.validation:
            self._best = max(self._best, probed.score)
            metrics["best_validation_score"] = self._best
            self._progress.note(
                f"prompt version {probe.number}: {probed.score:.3f} on {len(probe.task_ids)} "
                f"validation tasks, best so far {self._best:.3f}"
            )
        self._progress.update(rollouts=probed.spent)
        self._tracked.log_metrics(metrics, probed.spent)

    def _end_round(self, results: Sequence[Sequence[Trial]]) -> None:
        """The successors of one prompt have been tried."""
        self._rounds += 1
        scores = [
            _mean([math.nan if t.score is None else t.score for t in trials]) for trials in results
        ]
        self._progress.step_done(self._rounds, {"reward": max(scores), "best": self._best})

    def _write(self, line: str) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def rounds(config: OptimizePromptConfig) -> int:
    """The most rounds that the budget is good for: no successor goes on to validation."""
    prompt = config.prompt
    left = prompt.max_rollouts - prompt.first_rollouts - prompt.validation
    return max(1, left // (prompt.minibatch * (1 + prompt.proposals)))


def compare(before: HeldoutScore | None, after: HeldoutScore | None) -> Interval | None:
    """How much better, task by task; None where nothing was measured."""
    if before is None or after is None:
        return None
    return paired_difference(before.rewards, after.rewards)


def write_candidates(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Every try as one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) for row in history]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report_of(score: HeldoutScore | None) -> dict[str, Any] | None:
    """A held-out score for the summary."""
    return None if score is None else asdict(score.report)


def _rewards(record: RolloutRecord) -> dict[str, float] | None:
    return record.outcome.rewards if came_to_reward(record) and record.outcome else None


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
