"""A run as it was recorded: read back from MLflow and its folder, whatever state it is in.

Invariant: nothing is written. A run that still goes or has failed is read as far as it came; what
is not there is named in `missing`, never guessed.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_ray.errors import UserError
from lightning_ray.tracking.mlflow_run import TrackedRun, flat
from lightning_ray.tracking.redaction import masked
from lightning_ray.tracking.summary import RunSummary, read_summary

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HELDOUT = "heldout_"
"""Begins the name of a metric that is a score on held-out tasks."""


@dataclass(frozen=True)
class RecordedRun:
    """What is known of a run."""

    name: str
    """Its id among the runs: the name of its folder."""
    folder: Path | None
    """Its folder; None for a run that MLflow alone knows here."""
    mlflow_run_id: str | None
    """None for a run that stopped before it was recorded."""
    uri: str
    """The MLflow store."""
    status: str
    """In MLflow's words (RUNNING, FINISHED, FAILED, KILLED), or NOT STARTED."""
    config: Mapping[str, str] = field(default_factory=dict)
    """The resolved configuration, flat, secrets masked."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics by step, ascending: `step`, a step's metrics, `heldout_NAME` where it was scored."""
    summary: RunSummary | None = None
    """What the run came to, once it has ended."""
    revision: str = ""
    """The git commit of the code, with a `+` where tracked files differed from it."""
    missing: tuple[str, ...] = ()
    """What a finished run has and this one lacks, in words."""

    @property
    def trained(self) -> list[dict[str, float]]:
        """The rows of steps that were trained."""
        return [row for row in self.history if "seconds" in row]

    @property
    def scored(self) -> list[dict[str, float]]:
        """The rows of steps after which held-out tasks were scored; the first is step 0, if any."""
        return [row for row in self.history if any(name.startswith(HELDOUT) for name in row)]

    def curve(self, measure: str = "reward") -> list[dict[str, float]]:
        """The rows as `plot_learning_curves` takes them, `measure` on held-out tasks."""
        rows: list[dict[str, float]] = []
        for row in self.history:
            plain = {name: value for name, value in row.items() if not name.startswith(HELDOUT)}
            if HELDOUT + measure in row:
                plain["heldout"] = row[HELDOUT + measure]
            rows.append(plain)
        return rows


def read_run(client: "MlflowClient", uri: str, run: "Run", folder: Path | None) -> RecordedRun:
    """The run of the MLflow store that `client` is open on."""
    tracked = TrackedRun(client, uri, run.info.run_id)
    history = tracked.history(run.data.metrics)
    summary = _summary(folder)
    missing = []
    if not any("seconds" in row for row in history):
        missing.append("a trained step")
    if not any(HELDOUT + "reward" in row and row["step"] == 0 for row in history):
        missing.append("a held-out score before training")
    if not any(HELDOUT + "reward" in row and row["step"] > 0 for row in history):
        missing.append("a held-out score after training")
    if summary is None:
        missing.append("summary.json")
    tags = run.data.tags
    dirty = tags.get("lightning_ray.git.dirty") == "true"
    return RecordedRun(
        name=folder.name if folder else run.info.run_name,
        folder=folder,
        mlflow_run_id=run.info.run_id,
        uri=uri,
        status=run.info.status,
        config=_config(client, run),
        history=history,
        summary=summary,
        revision=tags.get("mlflow.source.git.commit", "")[:10] + "+" * dirty,
        missing=tuple(missing),
    )


def _summary(folder: Path | None) -> RunSummary | None:
    if folder is None or not (folder / "summary.json").is_file():
        return None
    return read_summary(folder / "summary.json")


def _config(client: "MlflowClient", run: "Run") -> dict[str, str]:
    """The configuration the run had last: that of its last resume, or its parameters."""
    from mlflow.exceptions import MlflowException

    try:
        files = [file.path for file in client.list_artifacts(run.info.run_id)]
        resumed = [path for path in files if path.startswith("config.resumed-")]
        name = max(resumed, key=_resume_number, default="config.yaml")
        if name not in files:
            return dict(run.data.params)
        with tempfile.TemporaryDirectory() as place:
            path = client.download_artifacts(run.info.run_id, name, place)
            found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (MlflowException, OSError):
        # The artifacts lie on another machine, or were moved: parameters are the same, shortened.
        return dict(run.data.params)
    return flat(masked(found))


def _resume_number(name: str) -> int:
    digits = name.removeprefix("config.resumed-").removesuffix(".yaml")
    return int(digits) if digits.isdigit() else 0


def find_mlflow_run(client: "MlflowClient", run: str) -> "Run | None":
    """The run with this MLflow id, or else the newest one of this name; None when there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(f"the MLflow store does not answer: {error.message}") from error
    experiments = [found.experiment_id for found in client.search_experiments()]
    name = run.replace("'", "")
    found = client.search_runs(
        experiments,
        f"attributes.run_name = '{name}'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return found[0] if found else None
