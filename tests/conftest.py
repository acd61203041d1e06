"""Fixtures that several rooms share."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four CPUs, for as long as the tests run."""
    ray.init(num_cpus=4, include_dashboard=False, address="local", log_to_driver=False)
    yield
    ray.shutdown()
