"""Fixtures that several rooms share: one Ray for the session, one engine, one learner."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from small_disk import SmallDisk

from lightning_ray.cluster.environment import quiet_environment

quiet_environment()
if "PYTEST_XDIST_WORKER" in os.environ:
    # Ray's workers are nice by default, and would starve beside another process of tests.
    os.environ.setdefault("RAY_worker_niceness", "0")

# How long an example takes says nothing on a machine that is shared.
hypothesis.settings.register_profile("fast", deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=100)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is in a file stays in one process, and what trains has the machine to itself.

    Files that share an engine come last: it would take the memory that training wants.
    """
    engine = {item.path for item in items if "shared_engine" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path in engine)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path)))
        if ROOT / "tests/end_to_end" in item.path.parents or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four CPUs, for as long as the tests run."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, address="local", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 256 KiB; the test is skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(mounting, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"only root may mount a small disk: {done.stderr.strip()}")
    yield SmallDisk(folder)
    # Lazily: what was read here may lie in memory that is mapped from its files, for a while yet.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, converted once into the user's cache."""
    from lightning_ray.policies.models import resolve_model

    return resolve_model("embedded")


@pytest.fixture(scope="session")
def cli() -> "CommandLine":
    """The console script, run in the project's folder as a user would."""
    return CommandLine()


class CommandLine:
    """Starts `lightning-ray` as a process of its own."""

    program = Path(sys.executable).with_name("lightning-ray")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts a command; its output is one stream of lines."""
        return subprocess.Popen(
            [str(self.program), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            [str(self.program), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="session")
def few_heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 16 held-out tasks of the example, for runs that must be short."""
    lines = (ROOT / "examples/calculator/heldout.jsonl").read_text().splitlines()[:16]
    path = tmp_path_factory.mktemp("tasks") / "heldout.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert all(json.loads(line) for line in lines)
    return path
