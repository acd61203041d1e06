"""The checks that training data goes through, and the settings of the `hygiene` group.

Invariant: every member of `Check` is a key of `HygieneConfig` of the same name, so that a message
may always say `hygiene.CHECK=POLICY`.
"""

from dataclasses import dataclass
from enum import StrEnum

from lightning_ray.errors import UserError


class Check(StrEnum):
    """What can be wrong with the data of a training step; the value is the configuration's key."""

    INFRASTRUCTURE_FAULTS = "infrastructure_faults"
    """Attempts that failed, timed out, were lost or never started, or had a call that failed."""
    INEXACT_TOKENS = "inexact_tokens"
    """Attempts whose tokens, logprobs or versions are missing or do not add up."""
    EMPTY_TRACES = "empty_traces"
    """Attempts that ended well without a single model call."""
    CUT_TRACES = "cut_traces"
    """Attempts with an unfinished call, or whose end was never recorded."""
    MISSING_REWARDS = "missing_rewards"
    """Attempts that ended well and have no finite number called "reward"."""
    CONTRADICTORY_REWARDS = "contradictory_rewards"
    """Attempts with two values of one name, or whose end and reward exclude each other."""
    LEAKAGE = "leakage"
    """Attempts at a held-out task."""
    DUPLICATE_SPANS = "duplicate_spans"
    """Rows whose span id was there before."""
    DUPLICATE_SAMPLES = "duplicate_samples"
    """Attempts that repeat another's sampled tokens, in a group with too many of them."""
    DUPLICATE_TASKS = "duplicate_tasks"
    """Groups whose task another group of the same batch has."""
    CONSTANT_GROUPS = "constant_groups"
    """Groups whose attempts are all worth the same."""
    CONSTANT_BATCHES = "constant_batches"
    """Batches of which every group is constant."""


class HygienePolicy(StrEnum):
    """What is done about a finding."""

    drop = "drop"
    """Leave it out of the batch, before credit is computed, and count it."""
    warn = "warn"
    """Count it and keep it."""
    stop = "stop"
    """End the run with one line that names it."""
    off = "off"
    """Do not look."""


@dataclass
class HygieneConfig:
    """A policy for each check."""

    infrastructure_faults: HygienePolicy = HygienePolicy.drop
    inexact_tokens: HygienePolicy = HygienePolicy.drop
    empty_traces: HygienePolicy = HygienePolicy.drop
    cut_traces: HygienePolicy = HygienePolicy.warn
    missing_rewards: HygienePolicy = HygienePolicy.drop
    contradictory_rewards: HygienePolicy = HygienePolicy.drop
    leakage: HygienePolicy = HygienePolicy.stop
    duplicate_spans: HygienePolicy = HygienePolicy.drop
    duplicate_samples: HygienePolicy = HygienePolicy.warn
    duplicate_tasks: HygienePolicy = HygienePolicy.warn
    constant_groups: HygienePolicy = HygienePolicy.drop
    constant_batches: HygienePolicy = HygienePolicy.warn
    max_duplicate_share: float = 0.5
    """Share of a group's attempts that may repeat another's tokens before they are findings."""
    offenders: int = 5
    """How many offenders of each check are named in hygiene.json."""

    def policy(self, check: Check) -> HygienePolicy:
        """What is done about findings of this check."""
        return HygienePolicy(getattr(self, check.value))


def check_hygiene(config: HygieneConfig) -> None:
    """Refuses numbers outside their range. Raises UserError."""
    if not 0 <= config.max_duplicate_share <= 1:
        raise UserError(
            f"hygiene.max_duplicate_share={config.max_duplicate_share}: must lie between 0 and 1"
        )
    if config.offenders < 1:
        raise UserError(
            f"hygiene.offenders={config.offenders}: the first is always named, so at least 1"
        )
