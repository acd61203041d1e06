"""Asking a run's queue from outside its cluster, by files in its folder.

Invariant: a request is carried out once, and its answer is there whole or not at all. Nothing
listens anywhere for it: whoever may write into the run's folder may ask.

The queue looks into `requests/` once a second. A request is `ID.json`, its answer `ID.answer`.
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError

log = logging.getLogger(__name__)

REQUESTS = "requests"
OPERATIONS = ("retry", "cancel", "workers")
LOOK_EVERY_S = 0.1
_STALE_S = 3600.0
"""Answers that nobody has taken are cleared after this long, seconds."""


def ask_queue(folder: Path, operation: str, names: Sequence[str], timeout_s: float) -> Any:
    """The queue's answer to a request. `folder` is the run's folder of rollouts.

    Raises UserError when no queue answers in time: the run is over, or was never there.
    """
    place = folder / REQUESTS
    place.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(8)
    request, answer = place / f"{name}.json", place / f"{name}.answer"
    _write(request, {"operation": operation, "names": list(names)})
    deadline = time.monotonic() + timeout_s
    while not answer.exists():
        if time.monotonic() > deadline:
            request.unlink(missing_ok=True)
            raise UserError(
                f"the queue of {folder.parent} did not answer within {timeout_s:g} s: the run is "
                "over, or it runs where this folder cannot be seen"
            )
        time.sleep(LOOK_EVERY_S)
    said: dict[str, Any] = json.loads(answer.read_text())
    answer.unlink()
    if "error" in said:
        raise UserError(said["error"])
    return said["answer"]


class Requests:
    """The queue's side."""

    def __init__(self, folder: Path):
        """`folder` as in `ask_queue`."""
        self._place = folder / REQUESTS

    def take(self) -> list[tuple[Path, str, list[str]]]:
        """The requests that wait: file, operation and names. One that is none is answered so."""
        if not self._place.is_dir():
            return []
        taken = []
        for path in sorted(self._place.glob("*.json")):
            try:
                said = json.loads(path.read_text())
                operation, names = said["operation"], [str(name) for name in said["names"]]
                if operation not in OPERATIONS:
                    raise ValueError(f"no operation {operation!r}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.answer(path, error=f"{path.name} is no request: {error}")
                continue
            taken.append((path, operation, names))
        for path in self._place.glob("*.answer"):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink(missing_ok=True)
        return taken

    def answer(self, request: Path, answer: Any = None, error: str | None = None) -> None:
        """Writes an answer (JSON values), or the error in its place."""
        said = {"answer": answer} if error is None else {"error": error}
        try:
            # Gone first: a queue that dies in between does not do it twice.
            request.unlink()
            _write(request.with_suffix(".answer"), said)
        except OSError as failure:
            log.error("request %s could not be answered: %s", request, failure)


def _write(path: Path, said: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(said))
    os.replace(temporary, path)
