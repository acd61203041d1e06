"""Configuration of the span store (Hydra group `spans`)."""

from dataclasses import dataclass

from lightning_ray.errors import UserError


@dataclass
class SpansConfig:
    """How spans are kept."""

    shards: int = 1
    """Actors that the store consists of; a rollout belongs to one. Fixed when a run begins."""
    segment_bytes: int = 256 * 1024 * 1024
    """A segment this large is closed and the next one begun, bytes."""
    append_timeout_s: float = 30.0
    """Longest that a writer waits for its spans to be on disk, seconds."""
    read_timeout_s: float = 60.0
    """Longest that a reader waits for a table, seconds."""


def check_spans(config: SpansConfig) -> None:
    """Raises UserError for values that no store can run with."""
    if not 1 <= config.shards <= 256:
        raise UserError(f"spans.shards={config.shards}: must be between 1 and 256")
    if config.segment_bytes < 1024 * 1024:
        raise UserError(
            f"spans.segment_bytes={config.segment_bytes}: a segment holds at least 1 MiB (1048576)"
        )
    for name in ("append_timeout_s", "read_timeout_s"):
        if getattr(config, name) <= 0:
            raise UserError(f"spans.{name}={getattr(config, name)}: must be above 0 seconds")
