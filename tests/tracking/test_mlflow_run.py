import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from lightning_ray.errors import UserError
from lightning_ray.tracking.config import TrackingConfig
from lightning_ray.tracking.mlflow_run import RunStatus, TrackedRun, git_revision, ui_command
from lightning_ray.tracking.store import default_uri

CONFIG = {
    "algorithm": {"name": "grpo", "group_size": 8, "clip": [0.2, 0.3]},
    "gateway": {"api_key": "sk-hidden", "host": None},
    "tracking": {"uri": "postgresql://me:hidden@db/runs"},
    "strange (name)": "x" * 9000,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root whose sqlite store is made once: its tables take 2 s."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def run(root: Path) -> TrackedRun:
    return TrackedRun.start(TrackingConfig(), root, "a run")


def reader(root: Path) -> MlflowClient:
    return MlflowClient(default_uri(root))


def test_a_run_is_recorded_in_the_output_root(root: Path, run: TrackedRun) -> None:
    run.log_text("hello", "notes/hello.txt")
    run.finish()
    stored = reader(root).get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "a run"
    folder = Path(stored.info.artifact_uri)
    assert folder.is_relative_to(root)
    assert (folder / "notes" / "hello.txt").read_text() == "hello"
    assert run.url_fragment == f"/#/experiments/{stored.info.experiment_id}/runs/{run.run_id}"


def test_the_resolved_configuration_is_logged_without_its_secrets(
    root: Path, run: TrackedRun
) -> None:
    run.log_config(CONFIG)
    stored = reader(root).get_run(run.run_id)
    params = stored.data.params
    assert params["algorithm.group_size"] == "8"
    assert params["algorithm.clip"] == "[0.2, 0.3]"
    assert params["gateway.host"] == "null"
    assert params["gateway.api_key"] == "***"
    assert len(params["strange _name_"]) <= 6000
    text = (Path(stored.info.artifact_uri) / "config.yaml").read_text()
    assert "hidden" not in text + str(params)
    assert yaml.safe_load(text)["strange (name)"] == "x" * 9000


def test_more_parameters_and_metrics_than_one_call_takes(root: Path, run: TrackedRun) -> None:
    run.log_config({f"p{at}": at for at in range(250)})
    run.log_metrics({f"m{at}": float(at) for at in range(1100)}, step=1)
    data = reader(root).get_run(run.run_id).data
    assert len(data.params) == 250
    assert data.metrics["m1099"] == 1099.0


def test_a_resumed_run_goes_on_where_it_was(root: Path, run: TrackedRun) -> None:
    run.log_config({"seed": 0})
    for step, reward in ((1, 0.1), (2, 0.2)):
        run.log_metrics({"reward": reward}, step)
    run.finish(RunStatus.KILLED)
    assert reader(root).get_run(run.run_id).info.status == "KILLED"

    again = TrackedRun.start(TrackingConfig(), root, "other name", resume=run.run_id)
    assert again.run_id == run.run_id
    assert reader(root).get_run(run.run_id).info.status == "RUNNING"
    again.log_config({"seed": 1, "new": 2})
    again.log_metrics({"reward": 0.5, "exact": 1}, 2)
    params = reader(root).get_run(run.run_id).data.params
    assert params == {"seed": "0", "new": "2"}
    folder = Path(reader(root).get_run(run.run_id).info.artifact_uri)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 0}
    assert yaml.safe_load((folder / "config.resumed-1.yaml").read_text()) == {"seed": 1, "new": 2}
    assert again.history(["reward", "exact"]) == [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": 0.5, "exact": 1.0},
    ]


def test_a_metric_that_is_no_finite_number_is_recorded(root: Path, run: TrackedRun) -> None:
    run.log_metrics({"loss": math.nan}, 1)
    assert math.isnan(reader(root).get_run(run.run_id).data.metrics["loss"])


def test_logging_a_step_costs_little(run: TrackedRun) -> None:
    metrics = {f"measure/{at}": 0.5 for at in range(25)}
    run.log_metrics(metrics, 0)
    seconds = []
    for step in range(1, 11):
        started = time.monotonic()
        run.log_metrics(metrics, step)
        seconds.append(time.monotonic() - started)
    # 6 ms on an idle machine; the fastest of ten, so that a busy one does not decide.
    assert min(seconds) < 0.05


def test_an_unknown_run_cannot_be_resumed(root: Path) -> None:
    with pytest.raises(UserError, match="no MLflow run 0123"):
        TrackedRun.start(TrackingConfig(), root, "x", resume="0123")


@pytest.mark.parametrize("uri", ["mlruns", "ftp://host/x", "sqlite:////proc/nowhere/mlflow.db"])
def test_a_store_that_cannot_be_opened_is_refused_in_one_line(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri") as refused:
        TrackedRun.start(TrackingConfig(uri=uri), tmp_path, "x")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database, but long enough to be read as one" * 99)
    with pytest.raises(UserError, match=r"tracking\.uri") as refused:
        TrackedRun.start(TrackingConfig(), tmp_path, "x")
    assert "\n" not in str(refused.value)


def test_the_revision_tells_a_changed_checkout_from_a_clean_one(tmp_path: Path) -> None:
    assert git_revision(tmp_path / "nowhere") is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, timeout=10)

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    clean = git_revision(tmp_path)
    assert clean is not None and len(clean.commit) == 40 and not clean.dirty
    (tmp_path / "file").write_text("two")
    changed = git_revision(tmp_path)
    assert changed is not None and changed.commit == clean.commit and changed.dirty


def test_the_command_for_mlflow_names_the_store_and_stays_on_this_machine(root: Path) -> None:
    uri = f"sqlite:///{root}/with space.db"
    words = shlex.split(ui_command(uri, port=5001))
    assert words[words.index("--backend-store-uri") + 1] == uri
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "5001"
    assert ui_command("http://tracking:5000") == "http://tracking:5000"


def test_importing_the_room_is_cheap_and_starting_a_run_is_silent(tmp_path: Path) -> None:
    # MLflow also switches its telemetry off where it sees a test or CI: hide both from it.
    shown = ("PATH", "HOME", "PYTHONPATH", "VIRTUAL_ENV")
    code = (
        "import sys\n"
        "import lightning_ray.tracking, lightning_ray.policies\n"
        "assert not {'mlflow', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "from pathlib import Path\n"
        "from lightning_ray.tracking import TrackedRun, TrackingConfig\n"
        f"run = TrackedRun.start(TrackingConfig(), Path('{tmp_path}'), 'silent')\n"
        "from lightning_ray.policies import PolicyRegistry\n"
        "assert PolicyRegistry(run.uri, 'policy', run.run_id).versions() == []\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None, 'telemetry is on'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={name: os.environ[name] for name in shown if name in os.environ},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
