"""The time in which a job's parts run: Ray comes up before, and nothing is left behind after.

Invariant: however a job ends, what it started is stopped once and whole, its MLflow run says how it
ended, and the person is told how to go on.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_ray.cluster import Connection
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.mlflow_run import RunStatus
from lightning_ray.training import Parts, TrainConfig, needs_of


@contextmanager
def session(
    config: TrainConfig,
    parts: Parts,
    tracked: TrackedRun,
    progress: Progress,
    again: str | None = None,
    learn: bool = True,
) -> Iterator[None]:
    """Ray is up inside; afterwards the parts are stopped and the MLflow run is closed.

    `again` is the command that goes on with the job, told when it did not finish; `learn` says
    whether the job has a learner.
    """
    status = RunStatus.FAILED
    connection = Connection(config.cluster, needs_of(config, learn))
    try:
        with progress.phase("starting Ray", slow=True):
            connection.__enter__()
        yield
        status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        raise
    finally:
        # Once, and whole: a second Ctrl-C or SIGTERM must not leave processes behind.
        handlers = {
            number: signal.signal(number, signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            if config.cluster.address != "local":
                # A local cluster takes its parts with it, and what they hold is on disk.
                parts.stop()
            connection.close()
            tracked.finish(status)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if status is not RunStatus.FINISHED and again is not None:
            progress.note(f"to go on: {again}")
