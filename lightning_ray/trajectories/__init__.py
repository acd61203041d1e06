"""Trajectories: from spans to token trees and to the Arrow batches that a learner trains on.

Owns rebuilding what each call saw from what the store kept, the token tree of an attempt, the batch
schema, and the checks that training data goes through. It must not know torch, an engine or an
algorithm: rewards and credit are plain numbers, compared and put where they belong.
"""

from lightning_ray.trajectories.batch import SEQUENCE_SCHEMA
from lightning_ray.trajectories.build import (
    BuildReport,
    CallPlaces,
    build_sequences,
    trainable_counts,
    with_advantages,
)
from lightning_ray.trajectories.credit import (
    CreditConfig,
    Member,
    by_token,
    check_credit,
    members,
    require_rewards,
    step_rewards,
    tokens_per_call,
)
from lightning_ray.trajectories.cut import Cut, cut_sequences
from lightning_ray.trajectories.hygiene import distinct_spans, inspect
from lightning_ray.trajectories.hygiene_attempts import (
    AttemptFacts,
    Place,
    attempts_of_spans,
    recorded_errors,
    task_key,
    task_keys,
)
from lightning_ray.trajectories.hygiene_config import (
    Check,
    HygieneConfig,
    HygienePolicy,
    check_hygiene,
)
from lightning_ray.trajectories.hygiene_report import HygieneReport
from lightning_ray.trajectories.tree import Call, TokenTree, rebuild_trees

__all__ = [
    "SEQUENCE_SCHEMA",
    "AttemptFacts",
    "BuildReport",
    "Call",
    "CallPlaces",
    "Check",
    "CreditConfig",
    "Cut",
    "HygieneConfig",
    "HygienePolicy",
    "HygieneReport",
    "Member",
    "Place",
    "TokenTree",
    "attempts_of_spans",
    "build_sequences",
    "by_token",
    "check_credit",
    "check_hygiene",
    "cut_sequences",
    "distinct_spans",
    "inspect",
    "members",
    "rebuild_trees",
    "recorded_errors",
    "require_rewards",
    "step_rewards",
    "task_key",
    "task_keys",
    "tokens_per_call",
    "trainable_counts",
    "with_advantages",
]
