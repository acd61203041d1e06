"""lightning-ray JOB --multirun: one job for each combination of settings, one after the other.

    lightning-ray train --multirun experiment=calculator seed=0,1,2 algorithm.group_size=4,8
    lightning-ray train --multirun resume=SWEEP     # the children that have not finished

Each child is a full job in a process of its own, so that Ray, engines and learner begin afresh. It
has a run's folder of its own and is begun as a run that stopped before its first step is resumed.
Its MLflow run hangs below the sweep's (`mlflow.parentRunId`).

Invariant: every child's configuration has been checked before the first starts; a child that fails
is reported and the others go on.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console
from rich.table import Table

from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import expand_sweep
from lightning_ray.jobs.lookup import read_run_folder
from lightning_ray.jobs.sweep_folder import Child, ChildStatus, SweepFolder, chosen, settings
from lightning_ray.tracking import RecordedRun, TrackedRun, figures, plot_learning_curves
from lightning_ray.tracking.comparing import heldout, shown
from lightning_ray.tracking.mlflow_run import RunStatus
from lightning_ray.tracking.redaction import masked
from lightning_ray.tracking.store import open_client
from lightning_ray.training import RunFolder

FLAGS = ("--multirun", "-m")
_SHARED = ("output_dir", "tracking.uri", "tracking.experiment")
"""What all children have in common: their runs hang below one parent in one store."""
_COMMAND = "from lightning_ray.cli import main; main()"
WIDTH = 150
"""Columns of a table that no terminal shows."""
STOP_TIMEOUT_S = 60.0
"""A job that is asked to stop needs up to 15 s."""
_RELAY_TIMEOUT_S = 5.0

Check = Callable[[Sequence[str]], Any]
"""From a child's overrides to its checked configuration (`name`, `output_dir`, `tracking`)."""


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether a sweep was asked for."""
    return any(flag in arguments for flag in FLAGS)


def sweep(job: str, arguments: Sequence[str], check: Check) -> None:
    """Runs or resumes a sweep of the command `job`; `check` raises UserError for a bad child.

    Raises UserError for what the user can mend, SystemExit 1 when a child failed, SystemExit 2 when
    several cannot be run, after a line for each mistake.
    """
    words = [word for word in arguments if word not in FLAGS]
    resumed = [word.removeprefix("resume=") for word in words if word.startswith("resume=")]
    if resumed:
        folder = _find(resumed[-1], [word for word in words if not word.startswith("resume=")])
        configs = _check_all({c.number: c.overrides for c in _left(folder)}, check)
        if not configs:
            raise UserError(f"every child of {folder.sweep_id} has finished: nothing to go on with")
    else:
        children = expand_sweep(words)
        configs = _check_all(dict(enumerate(children, 1)), check)
        root = Path(configs[0].output_dir)
        folder = SweepFolder.create(root, configs[0].name, words, children)
    _run(job, folder, configs)


def _run(job: str, folder: SweepFolder, configs: list[Any]) -> None:
    root = folder.path.parent
    tags = {"lightning_ray.sweep": folder.sweep_id}
    tracked = TrackedRun.start(
        configs[0].tracking, root, folder.sweep_id, resume=folder.mlflow_run_id, tags=tags
    )
    folder.mlflow_run_id = tracked.run_id
    folder.save()
    tracked.log_config({"multirun": masked(settings(folder.typed))})
    _say(f"sweep {folder.sweep_id} of {len(folder.children)} runs in {root}")
    status = RunStatus.FAILED
    try:
        for child, config in zip(_left(folder), configs, strict=True):
            _say(f"child {child.number}/{len(folder.children)}: {folder.label(child)}")
            _run_child(job, folder, child, config, tracked)
            if child.status is not ChildStatus.FINISHED:
                reason = child.reason or "stopped"
                _say(f"child {child.number} {child.status.value}: {reason}")
        if not _left(folder):
            status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        raise
    finally:
        with _deaf():
            _leave_results(folder, tracked)
            tracked.finish(status)
            if status is not RunStatus.FINISHED:
                _say(f"to go on: lightning-ray {job} --multirun resume={folder.sweep_id}")
    if status is RunStatus.FAILED:
        raise SystemExit(1)


def _run_child(
    job: str, folder: SweepFolder, child: Child, config: Any, tracked: TrackedRun
) -> None:
    """One child, from where it left off, in a process of its own."""
    if child.run is None:
        run = RunFolder.create(folder.path.parent, config.name, child.overrides)
        parent = {"mlflow.parentRunId": tracked.run_id, "lightning_ray.sweep": folder.sweep_id}
        run.write_facts({"tags": parent})
        child.run = run.run_id
    run = RunFolder(folder.path.parent / child.run)
    child.status, child.reason = ChildStatus.RUNNING, ""
    folder.save()
    process: subprocess.Popen[str] | None = None
    said: list[str] = []
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, job, f"resume={run.path}"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Ctrl-C is ours to pass on, once: the terminal would send it to both.
            start_new_session=True,
        )
        child.process = (process.pid, psutil.Process(process.pid).create_time())
        folder.save()
        assert process.stderr is not None
        relay = threading.Thread(target=_relay, args=(process.stderr, said), daemon=True)
        relay.start()
        # As long as the job takes: whatever it waits for itself has a timeout.
        code = process.wait()
        relay.join(_RELAY_TIMEOUT_S)
    except KeyboardInterrupt:
        child.status = ChildStatus.STOPPED
        raise
    finally:
        with _deaf():
            if process is not None:
                _stop(process)
                _close_record(run, tracked, process.returncode)
            child.process = None
            folder.save()
    child.status = {0: ChildStatus.FINISHED, 130: ChildStatus.STOPPED}.get(code, ChildStatus.FAILED)
    if child.status is ChildStatus.FAILED:
        ended = f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
        child.reason = said[0] if said else ended
    folder.save()


def _relay(stream: IO[str], said: list[str]) -> None:
    """Passes a child's stderr on, and keeps the line in which it says what went wrong."""
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.startswith(("error: ", "fault: ")):
            said[:] = [line.partition(": ")[2].strip()]


def _stop(process: "subprocess.Popen[str]") -> None:
    """Ends a child, unless it has ended."""
    if process.poll() is not None:
        return
    # To a job the same as Ctrl-C, and heard also by a process that was started deaf to it.
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _say(f"the run did not stop within {STOP_TIMEOUT_S:g} s and is killed")
        process.kill()
        process.wait(STOP_TIMEOUT_S)


def _close_record(run: RunFolder, tracked: TrackedRun, code: int) -> None:
    """A child that was killed could not say in MLflow that it ended."""
    run_id = run.facts().get("mlflow_run_id")
    if code < 0 and run_id is not None:
        open_client(tracked.uri).set_terminated(run_id, RunStatus.FAILED.value)


def _leave_results(folder: SweepFolder, tracked: TrackedRun) -> None:
    """The table and the picture of the children, on the terminal and in the parent's MLflow run."""
    runs = {
        child.number: read_run_folder(folder.path.parent / child.run, tracked.uri)
        for child in folder.children
        if child.run is not None
    }
    table = _table(folder, runs)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    tracked.log_text(captured.get(), "children.txt")
    for number, run in runs.items():
        values = {
            "child_heldout_before": heldout(run, "reward", after=False),
            "child_heldout_after": heldout(run, "reward", after=True),
            "child_train_seconds": figures(run)["train_seconds"],
        }
        known = {name: value for name, value in values.items() if value is not None}
        tracked.log_metrics(known, number)
    curves = {
        folder.label(child): runs[child.number].curve()
        for child in folder.children
        if child.number in runs and runs[child.number].history
    }
    if curves:
        plot_learning_curves(curves, folder.curves, title=folder.sweep_id)
        tracked.log_artifact(folder.curves)
        _say(f"learning curves   {folder.curves}")
        _say(f"to compare        lightning-ray compare {folder.sweep_id}")


def _table(folder: SweepFolder, runs: dict[int, RecordedRun]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("child", justify="right")
    for key in folder.swept:
        table.add_column(key, overflow="fold")
    for name in ("before", "after", "gain", "seconds"):
        table.add_column(name, justify="right")
    for name in ("status", "run"):
        table.add_column(name, overflow="fold")
    for child in folder.children:
        run = runs.get(child.number)
        before = None if run is None else heldout(run, "reward", after=False)
        after = None if run is None else heldout(run, "reward", after=True)
        seconds = None if run is None else figures(run)["train_seconds"]
        table.add_row(
            str(child.number),
            *chosen(child.overrides, folder.swept).values(),
            shown(before),
            shown(after),
            shown(None if before is None or after is None else after - before, "+.3f"),
            shown(seconds, ",.0f"),
            child.status.value,
            child.run or "-",
        )
    return table


def _find(name: str, others: Sequence[str]) -> SweepFolder:
    roots = [word.removeprefix("output_dir=") for word in others if word.startswith("output_dir=")]
    if len(roots) < len(others):
        raise UserError(
            "a sweep goes on with the settings it was begun with: "
            "give resume=SWEEP and output_dir= alone"
        )
    root = Path(roots[-1] if roots else "outputs")
    folder = SweepFolder.find(root, name)
    if folder is None:
        known = SweepFolder.known(root)
        there = f"the sweeps there are: {', '.join(known[-5:])}" if known else "there are none"
        raise UserError(f"resume={name}: no such sweep in {root}; {there}")
    for child in folder.children:
        if child.alive():
            assert child.process is not None
            raise UserError(
                f"child {child.number} of {name} still runs as process {child.process[0]}: "
                "wait for it, or stop it"
            )
    return folder


def _left(folder: SweepFolder) -> list[Child]:
    return [child for child in folder.children if child.status is not ChildStatus.FINISHED]


def _check_all(children: Mapping[int, Sequence[str]], check: Check) -> list[Any]:
    """Every child's configuration. Ends with status 2 after one line for each mistake."""
    configs = []
    mistakes: dict[str, list[int]] = {}
    for number, overrides in children.items():
        try:
            configs.append(check(overrides))
        except UserError as error:
            mistakes.setdefault(" ".join(str(error).split()), []).append(number)
    if mistakes:
        for message, numbers in mistakes.items():
            every = len(numbers) == len(children)
            which = "every child" if every else f"child {', '.join(map(str, numbers))}"
            print(f"error: {which}: {message}", file=sys.stderr)
        raise SystemExit(2)
    places = {(c.output_dir, c.tracking.uri, c.tracking.experiment) for c in configs}
    if len(places) > 1:
        raise UserError(f"a sweep's runs lie in one place: give {', '.join(_SHARED)} one value")
    return configs


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: what is being put in order is not left half done."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    # The children write to the same stream.
    print(text, flush=True)
