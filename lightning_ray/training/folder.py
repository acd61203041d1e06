"""The folder of a run: where each thing lies, and finding a run again.

OUTPUT_DIR/mlflow.db               every run's tracking store
OUTPUT_DIR/RUN_ID/overrides.json   what was typed
OUTPUT_DIR/RUN_ID/run.json         the MLflow run, the base model
OUTPUT_DIR/RUN_ID/spans/           the span store's segments
OUTPUT_DIR/RUN_ID/versions/POLICY/N/   weights of version N, a Hugging Face folder
OUTPUT_DIR/RUN_ID/checkpoints/     run state, and by policy weights and optimiser
OUTPUT_DIR/RUN_ID/hygiene.json     what the checks of its data found
OUTPUT_DIR/RUN_ID/summary.json     the result
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError
from lightning_ray.tracking import write_json

_CHECKPOINT = re.compile(r"step-(\d+)$")
_VERSION = re.compile(r"\d+$|\.\d+\.partial$")
_REMOVING = ".removing-"


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.run_id = path.name
        self.spans = path / "spans"
        self.versions = path / "versions"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.curve = path / "learning_curve.png"
        self.hygiene = path / "hygiene.json"

    @classmethod
    def create(cls, output_dir: Path, name: str, overrides: Sequence[str]) -> "RunFolder":
        """A new run's folder. Raises UserError when it cannot be written."""
        run_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder = cls(output_dir.absolute() / run_id)
        try:
            folder.path.mkdir(parents=True)
            folder.versions.mkdir()
            folder.checkpoints.mkdir()
        except OSError as error:
            raise UserError(
                f"output_dir={output_dir}: cannot make a run's folder there ({error.strerror}); "
                "name one that you can write"
            ) from error
        write_json(folder.path / "overrides.json", list(overrides))
        return folder

    @classmethod
    def find(cls, output_dir: Path, run: str, word: str = "resume") -> "RunFolder":
        """The folder of an earlier run that made versions, by its id or path, typed as `word=RUN`.

        Raises UserError when there is none.
        """
        for candidate in (output_dir / run, Path(run)):
            if (candidate / "overrides.json").is_file():
                found = cls(candidate.absolute())
                if found.evaluates:
                    raise UserError(f"{word}={run}: an evaluation, which made no version")
                return found
        folders = [cls(p.parent) for p in output_dir.glob("*/overrides.json")]
        known = sorted(folder.run_id for folder in folders if not folder.evaluates)
        there = f"the runs there are: {', '.join(known[-5:])}" if known else "there are none there"
        raise UserError(f"{word}={run}: no such run in {output_dir}; {there}")

    @property
    def evaluates(self) -> bool:
        """Whether it is the run of an evaluation."""
        return self.facts().get("job") == "evaluate"

    def overrides(self) -> list[str]:
        """What was typed when the run was begun."""
        return json.loads((self.path / "overrides.json").read_text())

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Keeps what a resumed run must not look up anew."""
        write_json(self.path / "run.json", facts)

    def facts(self) -> dict[str, Any]:
        """What `write_facts` kept; empty for a run that stopped before it began."""
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def trajectories(self, policy: str) -> Path:
        """Where the page of sample trajectories of a policy lies."""
        return self.path / f"trajectories-{policy}.html"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"step-{step:06d}"

    def whole_checkpoints(self) -> list[Path]:
        """The checkpoints that a run can be resumed from, oldest first."""
        return self._numbered(self.checkpoints, _CHECKPOINT)

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        found = self.whole_checkpoints()
        return found[-1] if found else None

    def prune_checkpoints(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints, and what a killed run was removing."""
        for left in self.checkpoints.glob(f"{_REMOVING}*"):
            shutil.rmtree(left)
        for old in self.whole_checkpoints()[:-keep]:
            # Renamed first, so that a half removed checkpoint is never taken for a whole one.
            doomed = old.with_name(_REMOVING + old.name)
            os.rename(old, doomed)
            shutil.rmtree(doomed)

    def versions_of(self, policy: str) -> Path:
        """Where the versions of a policy lie."""
        return self.versions / policy

    def version(self, policy: str, number: int) -> Path:
        """Where the weights of a version lie."""
        return self.versions_of(policy) / str(number)

    def last_version(self, policy: str) -> int:
        """The highest number that was given to a version, also to one that was not written whole;
        0 when only the base model is there."""
        found = self._numbered(self.versions_of(policy), _VERSION)
        return self._number(found[-1]) if found else 0

    def whole_versions(self, policy: str) -> list[int]:
        """The numbers of the versions that lie on disk, whole."""
        names = [path.name for path in self._numbered(self.versions_of(policy), _VERSION)]
        return [int(name) for name in names if name.isdigit()]

    def take_back_version(self, policy: str, number: int) -> None:
        """Makes a whole version one that was never written whole."""
        path = self.version(policy, number)
        os.rename(path, path.with_name(f".{number}.partial"))

    def empty_partial_versions(self, policy: str) -> None:
        """Frees what versions take that were never written whole; their numbers stay taken."""
        for left in self.versions_of(policy).glob(".*.partial"):
            shutil.rmtree(left)
            left.mkdir()

    @staticmethod
    def _number(path: Path) -> int:
        return int(re.findall(r"\d+", path.name)[-1])

    @classmethod
    def _numbered(cls, folder: Path, pattern: re.Pattern[str]) -> list[Path]:
        found = [p for p in folder.iterdir() if pattern.match(p.name)] if folder.is_dir() else []
        return sorted(found, key=cls._number)
