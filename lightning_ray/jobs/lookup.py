"""From what a person calls a run (an id, a folder, a sweep) to what was recorded of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import override_value
from lightning_ray.jobs.sweep_folder import SweepFolder, settings
from lightning_ray.tracking import RecordedRun, find_mlflow_run, read_run, read_summary
from lightning_ray.tracking.comparing import HELDOUT
from lightning_ray.tracking.redaction import masked
from lightning_ray.tracking.store import default_uri, open_client, without_password
from lightning_ray.training import RunFolder

_SHOWN = 5


@dataclass
class Found:
    """The runs that were named, in order, none twice."""

    runs: list[RecordedRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was named and is not there yet."""

    def add(self, run: RecordedRun) -> None:
        """Adds a run, unless it is there."""
        if all((run.name, run.folder) != (other.name, other.folder) for other in self.runs):
            self.runs.append(run)


def find_runs(words: Sequence[str], output_dir: Path, uri: str | None) -> Found:
    """The runs called `words`: run ids, folders, MLflow ids, or sweeps, which are all their runs.

    `uri` names the MLflow store where it is not the one of a run's own output folder.

    Raises:
        UserError: there is no such run; the line lists those that there are.
    """
    found = Found()
    for word in words:
        sweep = SweepFolder.find(output_dir, word)
        if sweep is None:
            run = _run(word, output_dir, uri)
            # Called by its MLflow id, a sweep is found as a run.
            sweep = SweepFolder.find(output_dir, run.name)
            if sweep is None:
                found.add(run)
                continue
        root = sweep.path.parent
        for child in sweep.children:
            if child.run is None or not (root / child.run).is_dir():
                found.notes.append(
                    f"{word}: child {child.number} ({sweep.label(child)}) has not begun"
                )
            else:
                found.add(read_run_folder(root / child.run, uri))
    return found


def read_run_folder(path: Path, uri: str | None = None) -> RecordedRun:
    """What was recorded of the run in the folder `path`.

    Where the store does not have it (it stopped too early, or its folder was moved), what the
    folder itself holds.
    """
    folder = RunFolder(path.absolute())
    overrides = folder.overrides()
    typed = override_value(overrides, "tracking.uri")
    store = uri or typed or default_uri(folder.path.parent)
    run_id = folder.facts().get("mlflow_run_id")
    # A database is not made by looking into it.
    if run_id is not None and _is_there(store):
        client = open_client(store)
        run = find_mlflow_run(client, run_id)
        if run is not None:
            return read_run(client, store, run, folder.path)
    return _from_folder(folder, store, settings(overrides))


def _run(word: str, output_dir: Path, uri: str | None) -> RecordedRun:
    for path in (output_dir / word, Path(word)):
        if (path / "overrides.json").is_file():
            return read_run_folder(path, uri)
    store = uri or default_uri(output_dir)
    if _is_there(store):
        client = open_client(store)
        run = find_mlflow_run(client, word)
        if run is not None:
            folder = output_dir / run.info.run_name
            there = (folder / "overrides.json").is_file()
            return read_run(client, store, run, folder.absolute() if there else None)
    raise UserError(f"no run {word!r} in {output_dir} nor in its MLflow store; {known(output_dir)}")


def known(output_dir: Path) -> str:
    """The newest runs and sweeps of an output folder, for the end of an error's line."""
    runs = sorted(
        (path.parent for path in output_dir.glob("*/overrides.json")),
        key=lambda path: path.stat().st_mtime,
    )
    names = [path.name for path in runs[-_SHOWN:]] + SweepFolder.known(output_dir)[-_SHOWN:]
    return f"there are: {', '.join(names)}" if names else "there are none there (set output_dir=)"


def _is_there(uri: str) -> bool:
    local = uri.removeprefix("sqlite:///")
    return local == uri or Path(local).is_file()


def _from_folder(folder: RunFolder, uri: str, overrides: dict[str, str]) -> RecordedRun:
    missing = [f"its record in {without_password(uri)}"]
    history: list[dict[str, float]] = []
    summary = None
    if folder.summary.is_file():
        summary = read_summary(folder.summary)
        history = [dict(row) for row in summary.extra.get("history", [])]
        for name, last in (("heldout_before_report", False), ("heldout_after_report", True)):
            row = _scores(summary.extra.get(name))
            if row:
                history.insert(len(history) if last else 0, row)
    else:
        missing += ["summary.json"]
    missing += ["the settings that were not typed"]
    return RecordedRun(
        name=folder.run_id,
        folder=folder.path,
        mlflow_run_id=None,
        uri=uri,
        status="FINISHED" if summary else "NOT RECORDED",
        config=masked(overrides),
        history=history,
        summary=summary,
        missing=tuple(missing),
    )


def _scores(report: dict[str, Any] | None) -> dict[str, float]:
    if not report:
        return {}
    means = {HELDOUT + name: float(row["mean"]) for name, row in report["measures"].items()}
    return {"step": float(report["step"]), **means}
