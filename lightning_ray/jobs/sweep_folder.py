"""The folder of a sweep: which children it has, and how far each has come.

OUTPUT_DIR/SWEEP_ID/sweep.json            what was typed, and the children
OUTPUT_DIR/SWEEP_ID/learning_curves.png   every child's curve
OUTPUT_DIR/RUN_ID/                        a child: a run's folder like any other

Invariant: `sweep.json` names a child's run before its process starts, so that a sweep which was
stopped anywhere can be gone on with and starts no child twice.
"""

import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from lightning_ray.errors import UserError
from lightning_ray.tracking import write_json
from lightning_ray.tracking.redaction import masked

_FILE = "sweep.json"
_ESCAPED = re.compile(r"\\(.)")


class ChildStatus(StrEnum):
    """How far a child has come."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    """By Ctrl-C; it can be resumed."""


@dataclass
class Child:
    """One job of the sweep."""

    number: int
    """From 1, in the order in which they run."""
    overrides: list[str]
    """What this job alone would have been typed as."""
    run: str | None = None
    """Its run's id; None before it is started for the first time."""
    status: ChildStatus = ChildStatus.WAITING
    reason: str = ""
    """Why it failed, one line."""
    process: tuple[int, float] | None = None
    """Its process and when that was created, seconds since the epoch, while it runs."""

    def alive(self) -> bool:
        """Whether its process still runs: it outlives a sweep that was killed."""
        if self.process is None:
            return False
        pid, created = self.process
        try:
            process = psutil.Process(pid)
            return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass
class SweepFolder:
    """A sweep on disk."""

    path: Path
    typed: list[str]
    children: list[Child]
    mlflow_run_id: str | None = None
    """The parent of the children's MLflow runs."""
    swept: list[str] = field(default_factory=list)
    """The keys that differ among the children."""

    @property
    def sweep_id(self) -> str:
        """The sweep's name among the runs."""
        return self.path.name

    @property
    def curves(self) -> Path:
        """The picture of all children."""
        return self.path / "learning_curves.png"

    @classmethod
    def create(
        cls, output_dir: Path, name: str, typed: Sequence[str], children: Sequence[Sequence[str]]
    ) -> "SweepFolder":
        """A new sweep's folder. Raises UserError when it cannot be written."""
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        path = output_dir.absolute() / f"{name}-sweep-{stamp}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"output_dir={output_dir}: cannot make a sweep's folder there ({error.strerror}); "
                "name one that you can write"
            ) from error
        made = [Child(number, list(words)) for number, words in enumerate(children, 1)]
        sweep = cls(path, list(typed), made, swept=swept_keys(children))
        sweep.save()
        return sweep

    @classmethod
    def find(cls, output_dir: Path, sweep: str) -> "SweepFolder | None":
        """An earlier sweep by its id or path; None when there is none.

        Raises:
            UserError: its file is damaged.
        """
        for path in (output_dir / sweep, Path(sweep)):
            if (path / _FILE).is_file():
                break
        else:
            return None
        try:
            found = json.loads((path / _FILE).read_text(encoding="utf-8"))
            children = [
                Child(
                    **{
                        **child,
                        "status": ChildStatus(child["status"]),
                        "process": child["process"] and tuple(child["process"]),
                    }
                )
                for child in found.pop("children")
            ]
            return cls(path.absolute(), children=children, **found)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path / _FILE} is no sweep's file: {error}") from error

    @staticmethod
    def known(output_dir: Path) -> list[str]:
        """The sweeps in an output folder, oldest first."""
        return sorted(path.parent.name for path in output_dir.glob(f"*/{_FILE}"))

    def save(self) -> None:
        """Writes `sweep.json`, whole or not at all."""
        write_json(
            self.path / _FILE,
            {
                "typed": self.typed,
                "mlflow_run_id": self.mlflow_run_id,
                "swept": self.swept,
                "children": [asdict(child) for child in self.children],
            },
        )

    def label(self, child: Child) -> str:
        """What sets a child apart from its siblings, secrets masked: `seed=0, group_size=4`."""
        return label(child.overrides, self.swept) or f"child {child.number}"


def settings(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides by key, as Hydra writes them less its escapes; the last of a key counts."""
    parts = (word.partition("=") for word in overrides)
    return {key: _ESCAPED.sub(r"\1", value) for key, _, value in parts}


def swept_keys(children: Sequence[Sequence[str]]) -> list[str]:
    """The keys that have more than one value among the children, in the order typed."""
    found = [settings(overrides) for overrides in children]
    keys = dict.fromkeys(key for values in found for key in values)
    return [key for key in keys if len({values.get(key) for values in found}) > 1]


def chosen(overrides: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """What the overrides set these keys to, "" for a key they do not have; secrets masked."""
    values = settings(overrides)
    return masked({key: values.get(key, "") for key in keys})


def label(overrides: Sequence[str], keys: Sequence[str]) -> str:
    """The same in a few words, each key by its last part; keys that are not set are left out."""
    typed = settings(overrides)
    values = chosen(overrides, [key for key in keys if key in typed]).items()
    return ", ".join(f"{key.lstrip('+~').rpartition('.')[2]}={value}" for key, value in values)
