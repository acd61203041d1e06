"""The figures that a finished run leaves in its output folder, `summary.json`.

Invariant: the file is whole or absent: it is written beside its place and moved there.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError


@dataclass(frozen=True)
class RunSummary:
    """What a training run came to."""

    heldout_before: float | None
    """Mean score on the held-out tasks before training; None where it was not measured."""
    heldout_after: float | None
    """The same after training."""
    steps: int
    """Steps trained in all, those before a resume included."""
    train_seconds: float
    """Wall-clock seconds of training, set-up and evaluation left out."""
    tokens_generated: int
    """Tokens that the policy sampled for training."""
    mlflow_run_id: str
    """The MLflow run."""
    model_dir: str
    """The folder of the trained model."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More figures, JSON values, written beside the ones above."""


_FIELDS = tuple(item.name for item in fields(RunSummary) if item.name != "extra")


def write_summary(path: Path, summary: RunSummary) -> None:
    """Write `summary` to the JSON file `path`.

    Raises:
        ValueError: `extra` repeats a field of the summary.
    """
    if clash := set(summary.extra) & set(_FIELDS):
        raise ValueError(f"extra fields repeat fields of the summary: {sorted(clash)}")
    write_json(path, {name: getattr(summary, name) for name in _FIELDS} | dict(summary.extra))


def read_summary(path: Path) -> RunSummary:
    """Read what `write_summary` wrote.

    Raises:
        UserError: there is no such file, or it is no summary.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"no summary at {path}: the run has not finished, or lies elsewhere"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    missing = [name for name in _FIELDS if not isinstance(found, dict) or name not in found]
    if missing:
        raise UserError(f"{path} is not a run's summary: it lacks {', '.join(missing)}")
    known = {name: found.pop(name) for name in _FIELDS}
    return RunSummary(**known, extra=found)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` whole or not at all; numbers that are not finite become null."""
    text = json_text(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """`value` as readable JSON; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
