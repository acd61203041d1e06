"""Manifests: which segments of a store are sealed, and in which files of which archive.

Invariant: a segment is sealed when its manifest, `shard-S/SEGMENT.sealed.json` beside the segments,
is there; it is written last, after every file that it names is durable.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.durable import write_durably
from lightning_ray.spans.schema import SCHEMA_VERSION

MANIFEST_SUFFIX = ".sealed.json"


@dataclass(frozen=True)
class SealedFile:
    """One Parquet file: the rows of a segment of one run, policy and version."""

    path: str
    """Relative to the archive."""
    run_id: str
    policy: str | None
    version: int | None
    rows: int
    bytes: int
    rollouts: int
    attempts: int
    first_rollout: str
    last_rollout: str
    first_attempt: str
    last_attempt: str
    """The least and the greatest ids in it, in order of code points."""


@dataclass(frozen=True)
class Sealed:
    """A sealed segment, as its manifest says."""

    shard: int
    segment: int
    archive: str
    """URI of the archive; empty for the folder `sealed` beside the shards."""
    schema_version: int
    rows: int
    bytes: int
    first_start_ns: int
    last_start_ns: int
    files: tuple[SealedFile, ...]

    def to_json(self) -> str:
        """As the manifest's text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Sealed":
        """Raises ValueError, KeyError or TypeError when it is none."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields | {"files": tuple(SealedFile(**file) for file in fields["files"])})

    @property
    def manifest(self) -> str:
        """Where its manifest is, relative to the folder of spans."""
        return f"shard-{self.shard}/{self.segment:08d}{MANIFEST_SUFFIX}"

    def write_manifest(self, folder: Path) -> Path:
        """Commits the seal in the folder of spans. Raises OSError; there is no manifest then."""
        path = folder / self.manifest
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, self.to_json().encode())
        return path


def read_manifests(folder: Path) -> list[Sealed]:
    """The sealed segments of a folder of spans, by shard and segment.

    Raises InfrastructureError when a manifest is damaged or of a newer version.
    """
    found = []
    for path in folder.glob("shard-*/*" + MANIFEST_SUFFIX):
        try:
            sealed = Sealed.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            raise InfrastructureError(f"{path} is no manifest of a sealed segment") from error
        if sealed.schema_version > SCHEMA_VERSION:
            raise InfrastructureError(
                f"{path} is of span schema {sealed.schema_version}; this version reads up to "
                f"{SCHEMA_VERSION}: use a newer lightning-ray"
            )
        found.append(sealed)
    return sorted(found, key=lambda sealed: (sealed.shard, sealed.segment))
