"""One MLflow run: started or resumed, and everything that is logged to it.

Invariant: what was logged stays. A resumed run adds to its metrics and artifacts; its first
parameters keep their values, because MLflow's parameters cannot be changed.

Calls go to the store directly: a batch of 25 metrics takes 6 ms on sqlite, against steps of
seconds, so nothing waits in a queue where a crash would lose it.
"""

import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_ray.errors import UserError
from lightning_ray.tracking.config import TrackingConfig
from lightning_ray.tracking.redaction import masked
from lightning_ray.tracking.store import default_uri, is_server, open_client, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's limits, as its `mlflow.utils.validation` sets them.
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000
_NAME_LENGTH = 250
_PARAM_LENGTH = 6000
_NOT_IN_NAMES = re.compile(r"[^/\w.\- :]")


class RunStatus(StrEnum):
    """How a run ended, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    """It raised."""
    KILLED = "KILLED"
    """Somebody stopped it; it can be resumed."""


@dataclass(frozen=True)
class GitRevision:
    """The commit of a checkout, and whether its tracked files differ from that commit."""

    commit: str
    dirty: bool


def git_revision(folder: Path) -> GitRevision | None:
    """The revision of the git checkout that holds `folder`; None where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return GitRevision(commit, dirty=bool(git("status", "--porcelain", "-uno")))
    except (OSError, subprocess.SubprocessError):
        # An installed package, no git, or a checkout that git declines: a run without a revision.
        return None


class TrackedRun:
    """A run in an MLflow store.

    Make one with `start`; call `finish` once at the end. Every method may raise MLflow's own
    `MlflowException` when the store is lost. Methods may be called from one thread at a time.
    """

    def __init__(self, client: "MlflowClient", uri: str, run_id: str) -> None:
        self._client = client
        self.uri = uri
        """The URI of the store."""
        self._run = client.get_run(run_id)

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        root: Path,
        name: str,
        *,
        resume: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> "TrackedRun":
        """Start a run called `name`, or go on with the MLflow run whose id is `resume`.

        Without `config.uri` the store is a sqlite file in `root`. The artifacts of an experiment
        that is new go under `root`; with a server, where the server says.

        Raises:
            UserError: the store cannot be opened, or has no run `resume`.
        """
        uri = config.uri or default_uri(root)
        # Before MLflow is imported: it reads its settings then.
        client = open_client(uri)
        from mlflow.exceptions import MlflowException

        if resume is not None:
            try:
                client.update_run(resume, status="RUNNING")
            except MlflowException as error:
                raise UserError(
                    f"no MLflow run {resume} in {without_password(uri)}: "
                    "check the run to resume and tracking.uri"
                ) from error
            return cls(client, uri, resume)

        run = client.create_run(
            experiment_id_of(client, uri, config.experiment, root),
            run_name=name,
            tags={
                "mlflow.source.name": "lightning-ray",
                "mlflow.source.type": "LOCAL",
                **_revision_tags(Path(__file__).parent),
                **(tags or {}),
            },
        )
        return cls(client, uri, run.info.run_id)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self._run.info.run_id

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment that holds the run."""
        return self._run.info.experiment_id

    def log_config(self, resolved: Mapping[str, Any]) -> None:
        """Log the resolved configuration: flat parameters, and the whole as `config.yaml`.

        Values that look secret are masked in both. A resumed run keeps its first parameters and
        adds its configuration as `config.resumed-N.yaml`.
        """
        from mlflow.entities import Param

        safe = masked(resolved)
        known = self._client.get_run(self.run_id).data.params
        params = [Param(name, value) for name, value in flat(safe).items() if name not in known]
        for batch in _batches(params, _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=batch)
        earlier = {file.path for file in self._client.list_artifacts(self.run_id)}
        resumes = sum(path.startswith("config.") for path in earlier)
        name = "config.yaml" if not resumes else f"config.resumed-{resumes}.yaml"
        self.log_text(yaml.safe_dump(safe, sort_keys=False, allow_unicode=True), name)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of step `step` in one call."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        entries = [Metric(_name(key), float(value), now, step) for key, value in metrics.items()]
        for batch in _batches(entries, _METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=batch)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy the file `path` into the run's artifacts, under `folder` there."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Store `text` as the artifact `name`, a path with forward slashes."""
        self._client.log_text(self.run_id, text, name)

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._client.set_tag(self.run_id, name, value)

    def history(self, names: Iterable[str]) -> list[dict[str, float]]:
        """Logged metrics by step: `{"step": n, name: value, ...}`, ascending.

        Where a resumed run went through a step again, its last value counts. One query a name.
        """
        rows: dict[int, dict[str, float]] = {}
        for name in names:
            points = self._client.get_metric_history(self.run_id, _name(name))
            for point in sorted(points, key=lambda point: point.timestamp):
                rows.setdefault(point.step, {"step": point.step})[name] = point.value
        return [rows[step] for step in sorted(rows)]

    def finish(self, status: RunStatus | str = RunStatus.FINISHED) -> None:
        """Record how the run ended."""
        self._client.set_terminated(self.run_id, RunStatus(status).value)

    @property
    def url_fragment(self) -> str:
        """The run's page, to be put behind the address that MLflow's UI is at."""
        return f"/#/experiments/{self.experiment_id}/runs/{self.run_id}"


def ui_command(uri: str, port: int = 5000) -> str:
    """The one command that opens MLflow on the store `uri`, for this machine alone.

    For a server there is nothing to start: the answer is its address. Artifacts need no option:
    the store knows where they are.
    """
    if is_server(uri):
        return without_password(uri)
    beside = Path(sys.executable).with_name("mlflow")
    program = str(beside) if beside.exists() else "mlflow"
    if beside.is_relative_to(Path.cwd()):
        program = str(beside.relative_to(Path.cwd()))
    store = shlex.quote(without_password(uri))
    return (
        f"MLFLOW_DISABLE_TELEMETRY=true {shlex.quote(program)} ui --backend-store-uri {store} "
        f"--host 127.0.0.1 --port {port} --workers 1"
    )


def experiment_id_of(client: "MlflowClient", uri: str, name: str, root: Path) -> str:
    """The experiment called `name`, made if there is none. Raises UserError for a deleted one."""
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    location = None if is_server(uri) else str(root.resolve() / "mlartifacts")
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Another run made it between the two calls.
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise UserError(
            f"the MLflow experiment {name!r} was deleted: restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}`, "
            "or name another in tracking.experiment"
        )
    return experiment.experiment_id


def _revision_tags(folder: Path) -> dict[str, str]:
    revision = git_revision(folder)
    if revision is None:
        return {}
    return {
        "mlflow.source.git.commit": revision.commit,
        "lightning_ray.git.dirty": str(revision.dirty).lower(),
    }


def _name(name: str) -> str:
    """`name` with what MLflow refuses in names replaced, and no longer than it allows."""
    return _NOT_IN_NAMES.sub("_", name)[:_NAME_LENGTH]


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as `{"a.b": "1"}`, in MLflow's limits; lists stay whole."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found.update(flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return found
    text = str(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    if len(text) > _PARAM_LENGTH:
        text = text[: _PARAM_LENGTH - 20] + "... (config.yaml)"
    return {_name(prefix): text}


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[at * size : (at + 1) * size] for at in range(math.ceil(len(items) / size)))
