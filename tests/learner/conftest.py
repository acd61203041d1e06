"""A model small enough to train in a blink."""

from pathlib import Path

import pytest
from learner_support import tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers, float32, output head tied to the embedding."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")
