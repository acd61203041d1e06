"""Opening an MLflow store, the same way for runs and for the registry.

Invariant: MLflow is imported here first, with its telemetry off, its migration messages silent and
its HTTP retries bounded, unless the user's environment says otherwise. A child process inherits
these settings.
"""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lightning_ray.errors import UserError
from lightning_ray.tracking.tables import give_tables

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE_FILE = "mlflow.db"

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's own defaults (7 retries, 120 s each) let a lost server hold a step for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}

_SCHEMES = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?://|https?://")
_USERINFO = re.compile(r"(\w://[^/\s:@]*):[^@/\s]*@")


def default_uri(root: Path) -> str:
    """The sqlite store in the output root `root`, as an MLflow URI."""
    return f"sqlite:///{root.resolve() / DATABASE_FILE}"


def is_server(uri: str) -> bool:
    """Whether `uri` names an MLflow server rather than a database this process opens itself."""
    return urlsplit(uri).scheme in ("http", "https")


def without_password(text: str) -> str:
    """`text` with the password of every `scheme://user:password@host` in it replaced by `***`."""
    return _USERINFO.sub(r"\1:***@", text)


def open_client(uri: str) -> "MlflowClient":
    """A client for the runs and the registry at `uri`; a database gets its tables at first use.

    The tables of a new sqlite file are copied (`tables.py`); of another new database MLflow makes
    them, which takes seconds.

    Raises:
        UserError: the URI is of no kind that MLflow keeps both runs and versions in, the store
            cannot be opened, or another version of MLflow made it.
    """
    if not _SCHEMES.match(uri):
        raise UserError(
            f"tracking.uri={without_password(uri)} is neither a database nor a server: use "
            "sqlite:////FOLDER/mlflow.db, postgresql://..., mysql://..., http://... or leave it out"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"tracking.uri: cannot make the folder {file.parent}: {error}"
            ) from error
        give_tables(file)

    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        reason = without_password(str(error).splitlines()[0])
        raise UserError(
            f"cannot open the MLflow store {without_password(uri)}: {reason}; "
            "check tracking.uri, or name a new one"
        ) from error
    return client
