"""Reading what a checkpoint says of itself, without torch and without loading weights."""

import json
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError

STATE_FILE = "state.json"
"""In a checkpoint's folder: {"learner": what the group needs, "state": the caller's own}."""


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The caller's state that `LearnerGroup.save_checkpoint` was given.

    Raises UserError when the folder is not a checkpoint.
    """
    path = Path(checkpoint) / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text())["state"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{checkpoint} is no checkpoint ({error}); resume from another run, or start anew"
        ) from error
    return state
