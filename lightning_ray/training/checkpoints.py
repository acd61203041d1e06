"""The checkpoints of a run: what every policy that learns needs to go on, and the run's state.

CHECKPOINTS/step-N/state.json   the run's state (`RunState`)
CHECKPOINTS/step-N/POLICY/      the learner's: weights, optimiser, random generators

Invariant: a checkpoint appears whole or not at all, so its parts are of one moment.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_ray.errors import UserError
from lightning_ray.learner import LearnerGroup
from lightning_ray.learner.folders import commit_folder, partial_folder
from lightning_ray.tracking import write_json
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.state import RunState

TIMEOUT_S = 900.0
_STATE = "state.json"


class Checkpoints:
    """Of one run, whose newest `keep` are kept."""

    def __init__(self, folder: RunFolder, keep: int):
        self._folder = folder
        self._keep = keep

    def save(self, learners: Mapping[str, LearnerGroup], state: RunState) -> None:
        """Saves what the learners, by policy, have now; removes what is older than is kept.

        A step that was trained again after a resume leaves the checkpoint that is there. Raises
        what `LearnerGroup.save_checkpoint` raises.
        """
        path = self._folder.checkpoint(state.step)
        if not path.exists():
            partial = partial_folder(path)
            for policy, learner in learners.items():
                learner.save_checkpoint(partial / policy, {"step": state.step}, TIMEOUT_S)
            write_json(partial / _STATE, state.to_json())
            commit_folder(partial, path)
        self._folder.prune_checkpoints(self._keep)

    def load(self, path: Path, learners: Mapping[str, LearnerGroup]) -> RunState:
        """Has every learner go on from a checkpoint; returns the run's state then.

        Raises UserError for one without a policy that is to learn.
        """
        self.require(path, list(learners))
        for policy, learner in learners.items():
            learner.load_checkpoint(path / policy, TIMEOUT_S)
        return self.peek(path)

    @staticmethod
    def require(path: Path, policies: Sequence[str]) -> None:
        """Raises UserError for a checkpoint without one of these policies, which are to learn."""
        for policy in policies:
            if not (path / policy).is_dir():
                raise UserError(
                    f"{path} has nothing of the policy {policy}, which is to be trained; it was "
                    "not when the run began"
                )

    @staticmethod
    def peek(path: Path) -> RunState:
        """The run's state at a checkpoint, without loading any weights.

        Raises UserError for a folder that is none, or one of an earlier release.
        """
        try:
            return RunState.from_json(json.loads((path / _STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no checkpoint that a run can go on from ({type(error).__name__}: "
                f"{error}); it is damaged or of an earlier release: start anew"
            ) from error

    def needed(self, policy: str) -> set[int]:
        """The versions of a policy that a run would be resumed with."""
        whole = self._folder.whole_checkpoints()
        return {self.peek(checkpoint).of(policy).version for checkpoint in whole}
