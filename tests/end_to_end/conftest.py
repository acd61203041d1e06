"""One engine on the real model, for all who need no more than an engine: it takes long to start."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from end_to_end.shared_engine import SharedEngine
from lightning_ray.inference import InferenceConfig, InferenceGroup
from lightning_ray.jobs.compose import compose_config
from lightning_ray.spans import SpansConfig, start_store
from lightning_ray.training import TrainConfig


@pytest.fixture(scope="package")
def shared_engine(
    ray_cluster: None, real_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedEngine]:
    """The default configuration's engine, which also reads tool calls."""
    config: TrainConfig = compose_config("train", TrainConfig, ["experiment=calculator"])
    inference: InferenceConfig = config.inference
    inference.tool_call_parser = "hermes"
    # A small model keeps to a tool's schema only where it must.
    inference.extra["tool_strict_level"] = "parameter"
    store = start_store(str(tmp_path_factory.mktemp("spans")), SpansConfig())
    group = InferenceGroup(inference, str(real_model), "policy", ["gpt-4o-mini"], 0, store)
    group.wait_ready()
    yield SharedEngine(group, store, real_model)
    group.stop()
    store.close()
