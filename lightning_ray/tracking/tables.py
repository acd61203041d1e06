"""A new sqlite store of MLflow's is copied from one that was made before.

MLflow takes every step of its schema's history to make the tables of a new store, over 2 s of
processor time. An empty store is kept per version of MLflow in the user's cache, and copied.
Invariant: a store is there whole or not at all, and one that is there is never touched.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_ray.cache import cache_root

log = logging.getLogger(__name__)


def give_tables(file: Path) -> None:
    """Makes a sqlite file that is not there into a store without experiments.

    Does nothing where there is a file. Where there is no room for a copy, or no cache, MLflow will
    make the tables itself.
    """
    if file.exists():
        return
    # Imported late: it takes a while, and a file that is there needs none of it.
    from sqlalchemy.exc import SQLAlchemyError

    try:
        kept = _kept()
        if kept is not None:
            _link(kept, file)
    except (OSError, SQLAlchemyError, RuntimeError) as error:  # The last: nobody knows a home.
        log.debug("MLflow makes the tables of %s itself: %s", file, error)


def _kept() -> Path | None:
    """The store that others are copied from; None where this version of MLflow makes none."""
    import mlflow
    from mlflow.store.db import utils

    kept = cache_root() / f"mlflow-{mlflow.__version__}.db"
    initialize = getattr(utils, "_initialize_tables", None)
    if kept.is_file() or initialize is None:
        return kept if kept.is_file() else None
    import sqlalchemy

    kept.parent.mkdir(parents=True, exist_ok=True)
    with _beside(kept) as new:
        engine = sqlalchemy.create_engine(f"sqlite:///{new}")
        try:
            initialize(engine)
        finally:
            engine.dispose()
        os.replace(new, kept)
    return kept


def _link(kept: Path, file: Path) -> None:
    with _beside(file) as new:
        shutil.copyfile(kept, new)
        # Not in the place of one that another process made meanwhile.
        with suppress(FileExistsError):
            os.link(new, file)


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A name for a file in the same folder, of which nothing is left."""
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=file.parent))
    try:
        yield folder / file.name
    finally:
        shutil.rmtree(folder)
