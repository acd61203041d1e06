"""Small files that are there whole or not at all, whatever happens to the process."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path`; its content and its name are on the disk when it returns. Raises OSError."""
    target = path.with_name(path.name + ".tmp")
    with open(target, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(target, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
