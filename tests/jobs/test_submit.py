"""`lightning-ray submit` against a real Ray cluster: sent, looked at, followed, stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from jobs_support import BIN, ROOT, RayHead, ray_head

from lightning_ray import cli

pytestmark = pytest.mark.timeout(600)

# Stands where our command stands, to say what a job finds: `cluster.program=./look`.
LOOK = f"""#!{sys.executable}
import json, os, sys
files = sorted(os.path.relpath(os.path.join(d, f)) for d, _, fs in os.walk(".") for f in fs)
names = ("NOT_FOR_ALL", "HOME", "RAY_ADDRESS")
seen = {{name: os.environ.get(name) for name in names}}
print(json.dumps({{"files": files, "words": sys.argv[1:], **seen}}))
"""

# Ends cleanly when it is told to, and needs longer for it than the 3 s that Ray gives by itself.
LINGER = f"""#!{sys.executable}
import signal, time
def end(*_):
    time.sleep(5)
    print("clean end", flush=True)
    raise SystemExit(130)
signal.signal(signal.SIGTERM, end)
print("lingering", flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def typed(
    head: RayHead, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Types `lightning-ray submit ...` with the cluster's token; its status and what it printed."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)

    def run(*words: str) -> tuple[int, str]:
        try:
            status = cli.run(["submit", *words, head.at])
        except SystemExit as end:
            status = int(str(end.code))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, and we are in it."""
    for name, text in {
        "agent.py": "",
        "deep/tasks.jsonl": "",
        ".env": "KEY=1",
        ".venv/bin/python": "",
        "outputs/run/spans": "",
        "deep/__pycache__/x.pyc": "",
        ".git/HEAD": "",
        "private/notes": "",
        "big/ignored.bin": "",
        ".gitignore": "big/\n",
        "look": LOOK,
        "linger": LINGER,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("look", "linger"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _job(printed: str) -> str:
    found = re.search(r"^submitted (\S+) to http", printed, re.M)
    assert found, printed
    return found.group(1)


def test_a_command_is_run_there_followed_and_listed(typed, project) -> None:
    status, printed = typed("version")
    assert status == 0
    job = _job(printed)
    assert f"lightning-ray submit logs {job} -f cluster.address=http" in printed
    status, log = typed("logs", job, "-f")
    assert status == 0 and f"\n{_version()}\n" in log and f"{job}: SUCCEEDED" in log
    status, printed = typed("status", job)
    assert status == 0 and printed.startswith(f"{job}: SUCCEEDED (")
    assert "lightning-ray version" in printed
    assert f"\n{_version()}\n" in typed("logs", job)[1]
    status, printed = typed("ls")
    assert status == 0 and re.search(rf"^{job} +SUCCEEDED", printed, re.M)
    # What has ended stays as it is.
    assert f"{job}: had ended already: SUCCEEDED" in typed("stop", job)[1]


@pytest.mark.slow
def test_the_folder_and_the_named_variables_go_along(
    typed, project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOT_FOR_ALL", "opensesame")
    status, printed = typed(
        "version",
        "cluster.program=./look",
        "cluster.excludes=[.git,.venv,/outputs,__pycache__,.env,private]",
        "cluster.env_vars=[NOT_FOR_ALL]",
        "cluster.job=looks-round",
    )
    assert status == 0 and _job(printed) == "looks-round"
    assert "opensesame" not in printed
    status, log = typed("logs", "looks-round", "-f")
    assert status == 0
    seen = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    assert seen["files"] == [".gitignore", "agent.py", "deep/tasks.jsonl", "linger", "look"]
    assert seen["words"] == ["version"]
    assert seen["NOT_FOR_ALL"] == "opensesame"
    assert "opensesame" not in typed("status", "looks-round")[1] + typed("ls")[1]
    status, printed = typed("version", "cluster.job=looks-round")
    assert status == 2 and "has a job of that id" in printed


@pytest.mark.slow
def test_a_job_that_fails_ends_its_log_with_status_1(typed, project) -> None:
    # A path that only the cluster's nodes have is not looked for here.
    job = _job(_train(typed, "training.tasks=/nowhere/tasks.jsonl")[1])
    status, log = typed("logs", job, "-f")
    assert status == 1 and f"{job}: FAILED" in log
    assert "error: /nowhere/tasks.jsonl: cannot read the task file" in log
    # It ran with what the cluster adds: its own home, and the cluster that it runs on.
    assert 'output_dir="$HOME"/lightning-ray' in log and "cluster.address=auto" in log
    status, printed = typed("status", job)
    assert status == 0 and "FAILED" in printed and "exit status 2" in printed


@pytest.mark.slow
def test_a_program_that_is_not_there_is_said_so(typed, project) -> None:
    job = _job(typed("version", "cluster.program=no-such-program")[1])
    assert typed("logs", job, "-f")[0] == 1
    assert "not on PATH there" in typed("status", job)[1]


def test_ctrl_c_leaves_the_job_and_stop_waits_for_its_clean_end(
    typed, project, head: RayHead
) -> None:
    job = _job(typed("version", "cluster.program=./linger")[1])
    follower = subprocess.Popen(
        [str(BIN / "lightning-ray"), "submit", "logs", job, "-f", head.at],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert follower.stdout is not None
    seen = ""
    for line in follower.stdout:
        seen += line
        if "lingering" in line:
            follower.send_signal(signal.SIGINT)
    assert follower.wait(30) == 130, seen
    assert f"{job} goes on; `lightning-ray submit stop {job}` stops it" in seen
    assert "Traceback" not in seen
    assert f"{job}: RUNNING" in typed("status", job)[1]
    started = time.monotonic()
    status, printed = typed("stop", job)
    assert status == 0 and f"{job}: STOPPED" in printed
    assert 5 < time.monotonic() - started < 60
    # Ray would have killed it after 3 seconds.
    assert "clean end" in typed("logs", job)[1]


@pytest.mark.parametrize("words", [("status", "nobody"), ("logs", "nobody"), ("stop", "nobody")])
def test_an_unknown_job_is_one_line(typed, words: tuple[str, str]) -> None:
    status, printed = typed(*words)
    assert status == 2 and printed.startswith("error: no job nobody at http")
    assert len(printed.splitlines()) == 1 and "lightning-ray submit ls" in printed


@pytest.mark.parametrize(("token", "reason"), [("wrong", "another's"), ("", "no token here")])
def test_a_token_that_does_not_open_is_one_line(
    typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, reason: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    status, printed = typed("ls")
    assert status == 2 and reason in printed and "RAY_AUTH_TOKEN" in printed
    assert len(printed.splitlines()) == 1


def test_what_is_typed_stands_above_rays_own_variables(
    typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert typed("ls")[0] == 0


def test_too_large_a_folder_is_one_line_with_its_largest_parts(typed, project) -> None:
    (project / "weights").mkdir()
    (project / "weights" / "model.bin").write_bytes(os.urandom(2 * 2**20))
    status, printed = typed("version", "cluster.max_upload_mib=1")
    assert status == 2 and "2 MiB packed" in printed and "weights (2 MiB)" in printed
    assert len(printed.splitlines()) == 1


def test_nothing_at_the_address_is_one_line_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        # Taken, so that nobody else answers, and not listening.
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        started = time.monotonic()
        assert cli.run(["submit", "ls", f"cluster.address={url}"]) == 2
    assert time.monotonic() - started < 10
    printed = capsys.readouterr().err
    assert f"{url}: no Ray job server answers there" in printed
    assert len(printed.splitlines()) == 1


def test_something_else_at_the_address_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert cli.run(["submit", "ls", f"cluster.address=127.0.0.1:{server.server_port}"]) == 2
    finally:
        server.shutdown()
        server.server_close()
    printed = capsys.readouterr().err
    assert "no Ray job server answers there" in printed and len(printed.splitlines()) == 1


def _short(output: Path) -> list[str]:
    """A training job that is cheap, once its parts have started."""
    return [
        "train",
        "experiment=calculator",
        f"output_dir={output}",
        "training.tasks_per_step=2",
        "algorithm.group_size=4",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_job_runs_there(
    typed, few_heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_model: Path
) -> None:
    monkeypatch.chdir(ROOT)
    heldout = f"evaluation.tasks={few_heldout}"
    # As on Kubernetes, where each of them has nodes of its own.
    rooms = ("rollouts", "inference", "learner")
    labels = [f"++{room}.node_labels={{lightning-ray/role:everything}}" for room in rooms]
    job = _job(typed(*_short(tmp_path), "training.steps=1", heldout, *labels)[1])
    status, log = typed("logs", job, "-f")
    assert status == 0, log
    assert f"{job}: SUCCEEDED" in log
    (run,) = [path for path in tmp_path.iterdir() if (path / "summary.json").is_file()]
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert f"{job}: SUCCEEDED" in typed("status", job)[1] and job in typed("ls")[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_job_that_is_stopped_ends_cleanly(
    typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_model: Path
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(ROOT)
    job = _job(typed(*_short(tmp_path), "training.steps=50", "evaluation.tasks=null")[1])
    deadline = time.monotonic() + 400
    while "step 1/50" not in (log := typed("logs", job)[1]):
        assert time.monotonic() < deadline and "FAILED" not in typed("status", job)[1], log
        time.sleep(2)
    status, printed = typed("stop", job)
    assert status == 0 and f"{job}: STOPPED" in printed
    # Its own words, and MLflow's record, are those of an end and not of a kill.
    assert "to go on: lightning-ray train resume=" in typed("logs", job)[1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("lightning-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"


def _train(typed: Callable[..., tuple[int, str]], *words: str) -> tuple[int, str]:
    return typed(
        "train",
        "agent.name=mine",
        "agent.command=[python,agent.py]",
        "agent.grader=grader.py:grade",
        *words,
    )


def _version() -> str:
    from lightning_ray import __version__

    return __version__
