"""The names of a run's rollouts, from which their batch and group can be told again.

STEP-SESSION-PLACE-SAMPLE: what they are run for (`s00003`: the step that was awaited when they were
admitted; `heldout-s00000` to measure), the life of the run that asked for them, the task's place
among those, and which of its samples. Invariant: `place_of` reads what `rollout_id` wrote.
"""

import re

from lightning_ray.trajectories import Place

MEASURING = "heldout"
"""Begins the names of rollouts that only measure; they are never learnt from."""

REHEARSAL = "rehearsal"
"""Begins the names of those that only try whether the agent can run at all."""

_ROLLOUT = re.compile(r"(?P<batch>.+-[0-9a-f]{6})-(?P<place>\d{4})-\d{2,}$")


def rollout_id(prefix: str, session: str, place: int, sample: int) -> str:
    """The id of one sample of a task; `session` is 6 hex digits."""
    return f"{prefix}-{session}-{place:04d}-{sample:02d}"


def place_of(rollout: str, group: str | None) -> Place:
    """Where a stored rollout stands; one that the conductor did not name has `group` alone."""
    found = _ROLLOUT.fullmatch(rollout)
    if found is None:
        return Place(group)
    learnt = not rollout.startswith((MEASURING, REHEARSAL))
    # A step that was trained again after a resume has rollouts of the same group twice; they were
    # never compared with each other.
    return Place(f"{found['batch']}-{found['place']}", found["batch"], learnt)
