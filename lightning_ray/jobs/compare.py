"""lightning-ray compare: what differs between runs, and what came of it.

    lightning-ray compare RUN RUN [RUN ...]     # run ids, folders, MLflow ids
    lightning-ray compare SWEEP                 # the runs of a multirun
    ... output_dir=DIR tracking.uri=URI --json FILE --picture FILE --no-log

Runs that still go, or have failed, are compared as far as they came, and what they lack is said.
The picture and the JSON are also stored with each run in MLflow, below `comparisons/`.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_ray.errors import UserError
from lightning_ray.jobs.compared_heldout import Compared, compare_heldout
from lightning_ray.jobs.compared_versions import Lineage, lineages
from lightning_ray.jobs.lookup import find_runs, known
from lightning_ray.jobs.sweep_folder import label, swept_keys
from lightning_ray.tracking import (
    RecordedRun,
    TrackedRun,
    differing,
    figures,
    plot_learning_curves,
    write_json,
)
from lightning_ray.tracking.comparing import configuration_table, figures_table
from lightning_ray.tracking.store import open_client
from lightning_ray.tracking.summary import json_text
from lightning_ray.training import RunFolder

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WIDTH = 120
_FOLDER = "comparisons"


@dataclass
class _Asked:
    runs: list[str] = field(default_factory=list)
    output_dir: Path = Path("outputs")
    uri: str | None = None
    json: Path | None = None
    picture: Path | None = None
    log: bool = True


@dataclass
class _Comparison:
    runs: list[RecordedRun]
    labels: list[str]
    typed: list[str]
    notes: list[str]
    configuration: dict[str, list[str | None]]
    figures: list[dict[str, float | None]]
    heldout: list[Compared]
    versions: list[list[Lineage]]
    picture: Path | None = None

    def to_json(self) -> dict[str, Any]:
        runs = [
            {
                "label": name,
                "run": run.name,
                "folder": None if run.folder is None else str(run.folder),
                "mlflow_run_id": run.mlflow_run_id,
                "status": run.status,
                "typed": typed,
                "revision": run.revision,
                "missing": list(run.missing),
                "versions": [asdict(lineage) for lineage in versions],
            }
            for name, run, typed, versions in zip(
                self.labels, self.runs, self.typed, self.versions, strict=True
            )
        ]
        return {
            "runs": runs,
            "configuration": self.configuration,
            "figures": {name: [row[name] for row in self.figures] for name in self.figures[0]},
            "heldout": [row.to_json() for row in self.heldout],
            "notes": self.notes,
            "picture": None if self.picture is None else str(self.picture),
        }


def main(arguments: Sequence[str]) -> None:
    """Compares runs. Raises UserError when one does not exist."""
    asked = _parse(arguments)
    found = find_runs(asked.runs, asked.output_dir, asked.uri)
    if len(found.runs) < 2:
        raise UserError(
            f"{len(found.runs)} run to compare, and it takes two; {known(asked.output_dir)}"
        )
    comparison = _compare(found.runs, found.notes)
    if any(run.history for run in found.runs):
        comparison.picture = asked.picture or _place(asked.output_dir, found.runs)
        _draw(comparison)
    _print(comparison)
    if asked.json is not None:
        write_json(asked.json, comparison.to_json())
        print(f"as JSON           {asked.json}")
    if asked.log:
        _log(comparison)


def _compare(runs: list[RecordedRun], notes: list[str]) -> _Comparison:
    overrides = [[] if run.folder is None else RunFolder(run.folder).overrides() for run in runs]
    # Only what was typed for every run tells them apart; MLflow alone does not know it.
    keys = swept_keys(overrides) if all(run.folder for run in runs) else []
    heldout = compare_heldout(runs, notes)
    return _Comparison(
        runs=runs,
        labels=[_letter(at) for at in range(len(runs))],
        typed=[label(words, keys) for words in overrides],
        notes=notes,
        configuration=differing([run.config for run in runs]),
        figures=[figures(run) for run in runs],
        heldout=heldout,
        versions=[
            [] if run.mlflow_run_id is None else lineages(run.uri, run.mlflow_run_id)
            for run in runs
        ],
    )


def _draw(comparison: _Comparison) -> None:
    assert comparison.picture is not None
    names = zip(comparison.labels, comparison.typed, strict=True)
    curves = {
        f"{name}  {typed}".rstrip(): run.curve()
        for (name, typed), run in zip(names, comparison.runs, strict=True)
    }
    try:
        plot_learning_curves(curves, comparison.picture)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--picture {comparison.picture}: cannot be written ({error}); name a .png, .svg or "
            ".pdf in a folder that you can write"
        ) from error


def _print(comparison: _Comparison) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    labels = comparison.labels
    for name, run, typed in zip(labels, comparison.runs, comparison.typed, strict=True):
        revision = f"commit {run.revision}" if run.revision else ""
        words = [name, run.name, run.status.lower(), typed, revision]
        print("  ".join(word for word in words if word))
        if run.missing:
            print(f"   lacks {', '.join(run.missing)}")
    for note in comparison.notes:
        print(f"note: {note}")
    print()
    if comparison.configuration:
        console.print(configuration_table(comparison.configuration, labels))
    else:
        print("the configurations are the same")
    print()
    first = {words: shown for row in comparison.heldout for words, shown in row.rows().items()}
    console.print(figures_table(comparison.figures, labels, first))
    print()
    for row in comparison.heldout:
        for line in row.lines(labels):
            print(line)
    for name, versions in zip(labels, comparison.versions, strict=True):
        for lineage in versions:
            print(f"versions of {name}: {lineage.words()}")
    if comparison.picture is not None:
        print(f"learning curves   {_short(comparison.picture)}")


def _log(comparison: _Comparison) -> None:
    """Stores the picture and the JSON with every run that MLflow knows."""
    stem = _stem(comparison.runs)
    for run in comparison.runs:
        if run.mlflow_run_id is None:
            continue
        tracked = TrackedRun(open_client(run.uri), run.uri, run.mlflow_run_id)
        place = f"{_FOLDER}/{stem}"
        if comparison.picture is not None:
            tracked.log_artifact(comparison.picture, place)
        tracked.log_text(json_text(comparison.to_json()), f"{place}/comparison.json")


def _parse(arguments: Sequence[str]) -> _Asked:
    asked = _Asked()
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in ("--json", "--picture"):
            if not words:
                raise UserError(f"{word} names a file: {word} FILE")
            setattr(asked, word.removeprefix("--"), Path(words.pop(0)))
        elif word == "--no-log":
            asked.log = False
        elif word.startswith("output_dir="):
            asked.output_dir = Path(word.removeprefix("output_dir="))
        elif word.startswith("tracking.uri="):
            asked.uri = word.removeprefix("tracking.uri=")
        elif word.startswith("-"):
            raise UserError(f"compare knows no {word}; it knows --json, --picture and --no-log")
        elif "=" in word and not Path(word).exists():
            raise UserError(
                f"compare knows no setting {word}; output_dir= and tracking.uri= it does"
            )
        else:
            asked.runs.append(word)
    if not asked.runs:
        raise UserError(f"name the runs to compare, or a sweep; {known(asked.output_dir)}")
    return asked


def _place(output_dir: Path, runs: Sequence[RecordedRun]) -> Path:
    return output_dir / _FOLDER / f"{_stem(runs)}.png"


def _stem(runs: Sequence[RecordedRun]) -> str:
    """A name for the comparison: the same runs in the same order give the same."""
    names = [run.name for run in runs]
    if len(names) == 2:
        return f"{names[0]}--{names[1]}"
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{names[0]}--and-{len(names) - 1}-more-{digest}"


def _letter(at: int) -> str:
    return _LETTERS[at] if at < len(_LETTERS) else f"{_LETTERS[at % 26]}{at // 26}"


def _short(path: Path) -> Path:
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path
