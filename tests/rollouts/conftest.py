from collections.abc import Iterator

import pytest
from door_support import listening


@pytest.fixture(scope="session")
def door_url() -> Iterator[str]:
    """Where a door answers: the attempts of agents that fail are their own fault."""
    with listening() as url:
        yield url
