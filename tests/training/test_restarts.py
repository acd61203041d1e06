"""A run outlives the death of its parts, but not a cause that stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import InfrastructureError
from lightning_ray.training.restarts import Restarts


@given(st.integers(0, 4), st.lists(st.integers(0, 6), max_size=30))
def test_it_gives_up_after_so_many_deaths_without_progress(most: int, steps: list[int]) -> None:
    restarts = Restarts(most)
    since, reached = 0, -1
    for step in steps:
        # A step that is trained again, from a checkpoint, is no progress.
        since = since + 1 if step <= reached else 1
        reached = max(reached, step)
        if since > most:
            with pytest.raises(InfrastructureError, match=r"training.max_restarts=.*the learner"):
                restarts.count("the learner", step)
            return
        restarts.count("the learner", step)
