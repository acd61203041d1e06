"""The parts of a job while it runs, and their end, whatever the job came to.

Invariant: no process outlives the job, and its MLflow run says how it ended.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_ray.cluster import Connection
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.mlflow_run import RunStatus
from lightning_ray.training import Parts, RunFolder, TrainConfig


@contextmanager
def running_parts(
    config: TrainConfig, folder: RunFolder, base: Path, progress: Progress, tracked: TrackedRun
) -> Iterator[Parts]:
    """Connects to Ray; on leaving, stops the parts and finishes `tracked`.

    The caller starts the parts. Raises UserError where there is no cluster at the address.
    """
    connection = Connection(config.cluster)
    parts = Parts(config, folder, base, progress)
    status = RunStatus.FAILED
    try:
        with progress.phase("starting Ray", slow=True):
            connection.__enter__()
        yield parts
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
