"""An engine that the tests of several files ask in turn."""

from dataclasses import dataclass
from pathlib import Path

from lightning_ray.inference import InferenceGroup
from lightning_ray.spans import SpanClient


@dataclass
class SharedEngine:
    """The engine, the store that it records in, and which version it has."""

    group: InferenceGroup
    store: SpanClient
    base: Path
    version: int = 0

    def take_on(self, folder: Path) -> None:
        """The weights of a folder, as the next version."""
        self.group.update_weights(str(folder), self.version + 1)
        self.version += 1
