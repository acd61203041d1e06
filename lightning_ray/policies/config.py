"""The settings of the `policy` configuration group, as Hydra checks them."""

from dataclasses import dataclass


@dataclass
class PolicyConfig:
    """What is trained."""

    name: str = "policy"
    """The policy's name, and that of its registered model in MLflow."""
    model: str = "embedded"
    """What version 0 is: `embedded`, a Hugging Face folder, or a Hugging Face id."""
    keep_versions: int = 3
    """Newest versions whose weights stay on disk, beside those that a checkpoint needs."""
