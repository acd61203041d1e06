"""The versions of a policy: numbered, immutable, with their lineage, on the MLflow registry.

Owns which versions there are, where their weights lie, which weights are still kept, and which
versions are released. It does not know how a version was made. The application side and the
learning side both read it; it imports neither.
"""

from lightning_ray.policies.config import (
    PolicyConfig,
    UpstreamConfig,
    choose_policy,
    settle_policies,
)
from lightning_ray.policies.prompts import PromptVersion
from lightning_ray.policies.registry import PolicyRegistry, PolicyVersion
from lightning_ray.policies.releases import Release, Releases
from lightning_ray.policies.retention import prune

__all__ = [
    "PolicyConfig",
    "PolicyRegistry",
    "PolicyVersion",
    "PromptVersion",
    "Release",
    "Releases",
    "UpstreamConfig",
    "choose_policy",
    "prune",
    "settle_policies",
]
