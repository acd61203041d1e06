"""Trajectories: from spans to token trees and to the Arrow batches that a learner trains on.

Owns rebuilding what each call saw from what the store kept, the token tree of an attempt, and the
batch schema. It must not know torch, an engine, a reward or an algorithm: credit comes in as plain
numbers and is only put where it belongs.
"""

from lightning_ray.trajectories.batch import SEQUENCE_SCHEMA
from lightning_ray.trajectories.build import (
    BuildReport,
    build_sequences,
    trainable_counts,
    with_advantages,
)
from lightning_ray.trajectories.tree import Call, TokenTree, rebuild_trees

__all__ = [
    "SEQUENCE_SCHEMA",
    "BuildReport",
    "Call",
    "TokenTree",
    "build_sequences",
    "rebuild_trees",
    "trainable_counts",
    "with_advantages",
]
