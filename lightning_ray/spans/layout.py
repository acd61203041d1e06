"""How a store's folder is laid out: a folder for each shard, how many there are, and the archive.

Invariant: both are fixed when the folder is made. The number of shards decides which shard a
rollout belongs to, and the archive holds what the shards' manifests name; a store that is opened
again goes on with what it began with.
"""

import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.schema import SCHEMA_VERSION
from lightning_ray.spans.segment import SUFFIX, sync_folder
from lightning_ray.spans.segments import write_durably

log = logging.getLogger(__name__)

STORE = "store.json"
SEALED = "sealed"
"""The archive's folder, where none is configured."""


@dataclass(frozen=True)
class Layout:
    """A store's folder."""

    folder: Path
    shards: int
    archive: str
    """As configured: empty for the folder `sealed` in it."""

    @property
    def folders(self) -> list[Path]:
        """The shards' folders."""
        return [self.folder / f"shard-{number}" for number in range(self.shards)]

    @property
    def archive_uri(self) -> str:
        """Where sealed segments are."""
        return self.archive or str(self.folder / SEALED)


def prepare_folder(folder: Path, shards: int, archive: str) -> Layout:
    """Makes a store's folder, or finds what it was made with; the rest is for a new one.

    Raises InfrastructureError when the disk refuses, or when the folder says something that cannot
    be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = read_layout(folder)
        if kept is None:
            kept = Layout(folder, shards, archive)
            flat = sorted(folder.glob("*" + SUFFIX))
            if flat:
                # As stores of schema version 1 were laid out: one shard, in the folder itself.
                kept = Layout(folder, 1, archive)
                kept.folders[0].mkdir(exist_ok=True)
                for path in flat:
                    path.rename(kept.folders[0] / path.name)
            said = {"shards": kept.shards, "archive": archive, "schema": SCHEMA_VERSION}
            write_durably(folder / STORE, json.dumps(said))
        elif (kept.shards, kept.archive) != (shards, archive):
            log.warning(
                "%s was made with spans.shards=%d spans.archive='%s', and keeps them",
                folder,
                kept.shards,
                kept.archive,
            )
        for path in kept.folders:
            path.mkdir(exist_ok=True)
        sync_folder(folder)
        return kept
    except OSError as error:
        raise InfrastructureError(
            f"the span store's folder {folder} cannot be used: {error.strerror or error}"
        ) from error


def read_layout(folder: Path) -> Layout | None:
    """What a folder says of itself; None for one that no store of this version has made.

    Raises OSError, and InfrastructureError for what cannot be read.
    """
    path = folder / STORE
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text())
        layout = Layout(folder, int(said["shards"]), str(said["archive"]))
        if layout.shards < 1:
            raise ValueError(f"{layout.shards} shards")
    except (ValueError, KeyError, TypeError) as error:
        raise InfrastructureError(f"{path} cannot be read: {error}") from error
    return layout


def shard_of(rollout_id: str, shards: int) -> int:
    """The shard that a rollout belongs to, the same in every process."""
    return zlib.crc32(rollout_id.encode()) % shards


def holds_spans(folder: Path) -> bool:
    """Whether a folder is a store's, of whatever version."""
    return (folder / STORE).is_file() or any(folder.glob("*" + SUFFIX))
