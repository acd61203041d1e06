"""How a store's folder is laid out: a folder for each shard, and how many there are.

Invariant: the number of shards is fixed when the folder is made, because it decides which shard a
rollout belongs to; a store that is opened again has as many as it began with.
"""

import json
import logging
import zlib
from pathlib import Path

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.durable import sync_folder, write_durably
from lightning_ray.spans.schema import SCHEMA_VERSION
from lightning_ray.spans.segment import SUFFIX

log = logging.getLogger(__name__)

STORE = "store.json"


def prepare_folder(folder: Path, shards: int) -> int:
    """Makes a store's folder with so many shards, or says how many the one that is there has.

    Raises InfrastructureError when the disk refuses, or when the folder says something that cannot
    be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = _shards_of(folder)
        if kept is None:
            kept = shards
            flat = sorted(folder.glob("*" + SUFFIX))
            if flat:
                # As stores of schema version 1 were laid out: one shard, in the folder itself.
                kept = 1
                shard_folder(folder, 0).mkdir(exist_ok=True)
                for path in flat:
                    path.rename(shard_folder(folder, 0) / path.name)
            said = {"shards": kept, "schema": SCHEMA_VERSION}
            write_durably(folder / STORE, json.dumps(said).encode())
        elif kept != shards:
            log.warning("%s has %d shards and keeps them (spans.shards=%d)", folder, kept, shards)
        for number in range(kept):
            shard_folder(folder, number).mkdir(exist_ok=True)
        sync_folder(folder)
        return kept
    except OSError as error:
        raise InfrastructureError(
            f"the span store's folder {folder} cannot be used: {error.strerror or error}"
        ) from error


def shard_folder(folder: Path, number: int) -> Path:
    """The folder of one shard."""
    return folder / f"shard-{number}"


def _shards_of(folder: Path) -> int | None:
    path = folder / STORE
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text())
        shards = int(said["shards"])
        if shards < 1:
            raise ValueError(f"{shards} shards")
    except (ValueError, KeyError, TypeError) as error:
        raise InfrastructureError(f"{path} cannot be read: {error}") from error
    return shards


def shard_of(rollout_id: str, shards: int) -> int:
    """The shard that a rollout belongs to, the same in every process."""
    return zlib.crc32(rollout_id.encode()) % shards
