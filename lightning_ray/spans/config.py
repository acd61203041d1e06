"""Configuration of the span store (Hydra group `spans`)."""

from dataclasses import dataclass

from lightning_ray.errors import UserError


@dataclass
class SpansConfig:
    """How spans are kept."""

    shards: int = 1
    """Actors that the store consists of; a rollout belongs to one. Fixed when a run begins."""
    segment_bytes: int = 64 * 1024 * 1024
    """A segment this large is closed and the next one begun, bytes."""
    seal_after_s: float = 3600.0
    """A segment that was begun this long ago is closed too, so that it can be sealed, seconds."""
    archive: str = ""
    """Where closed segments are sealed as Parquet: a folder, or a URI such as s3://BUCKET/PATH.
    Empty for the folder `sealed` beside the shards."""
    keep_days: float = 0.0
    """Sealed spans whose last began longer ago than this are removed, days; 0 keeps them."""
    keep_bytes: int = 0
    """The oldest sealed spans of a shard beyond this are removed, bytes; 0 keeps them."""
    keep_local_bytes: int = 4 * 1024 * 1024 * 1024
    """Sealed segments of a shard beyond this size are read from the archive alone, bytes."""
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
    for name in ("keep_local_bytes", "keep_days", "keep_bytes"):
        if not getattr(config, name) >= 0:
            raise UserError(f"spans.{name}={getattr(config, name)}: must be 0 or more")
    for name in ("append_timeout_s", "read_timeout_s", "seal_after_s"):
        if getattr(config, name) <= 0:
            raise UserError(f"spans.{name}={getattr(config, name)}: must be above 0 seconds")
