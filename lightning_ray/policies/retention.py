"""Removing the weights of old versions, so that a long run does not fill the disk.

Invariant: nothing outside the given folder is ever removed, nor the base, nor the newest versions,
nor a pinned one; and every removal is returned and recorded in the registry.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from lightning_ray.policies.registry import PolicyRegistry, PolicyVersion, Weights


def prune(
    registry: PolicyRegistry, folder: Path, keep: int, pinned: Collection[int] = ()
) -> list[PolicyVersion]:
    """Remove the weights of old versions beyond the newest `keep`; returns what was removed.

    Kept besides: the base (the lowest number), the numbers in `pinned` (those that checkpoints
    need, the best one), and versions whose folder is not below `folder`, such as a base model that
    is the user's own, or holds that of a kept version. The registry keeps the entry of a removed
    version, marked.

    Raises:
        ValueError: `keep` is less than 1.
        OSError: a folder cannot be removed. Its version is marked already; the next call removes
            the rest of it.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: the newest version is in use")
    root = folder.resolve()
    versions = registry.versions()
    kept = {version.number for version in versions[:1] + versions[-keep:]} | set(pinned)
    needed = [version.path.resolve() for version in versions if version.number in kept]
    removed = []
    for version in versions:
        if version.number in kept or not _lies_in(version.path, root):
            continue
        if any(path.is_relative_to(version.path.resolve()) for path in needed):
            continue
        exists = version.path.exists()
        if version.weights is Weights.REMOVED and not exists:
            continue
        # Marked first: nobody may take a half-removed folder for a version.
        if version.weights is not Weights.REMOVED:
            registry.mark_weights(version.number, Weights.REMOVED)
        if exists:
            shutil.rmtree(version.path)
        removed.append(version)
    return removed


def _lies_in(path: Path, root: Path) -> bool:
    """Whether `path` is a folder's own place below `root`, not a link to somewhere else."""
    return not path.is_symlink() and root in path.resolve().parents
