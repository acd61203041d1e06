"""What a shard of the store says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreStats:
    """What a store holds."""

    spans: int
    segments: int
    bytes: int
    duplicates: int
    """Spans that were sent again and not stored twice, since this process began."""
    lost_bytes: int
    """Bytes of torn batches that no writer was ever told were stored."""
    damaged_bytes: int
    """Bytes that changed on disk beyond mending, or are missing: spans were lost there."""
    mended_bytes: int
    """Bytes that had changed on disk and were put right."""
    sealed: int
    """Segments that are in the archive."""
    sealed_bytes: int
    """Bytes of them there."""
    removed: int
    """Spans that retention has removed, or somebody; `removed/` in the folder says which."""

    def __add__(self, other: "StoreStats") -> "StoreStats":
        mine, others = vars(self), vars(other)
        return StoreStats(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class Heard:
    """Where a listener of `activity` stands: which process it listened to, and how far."""

    process: str
    flush: int
