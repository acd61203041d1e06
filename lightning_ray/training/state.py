"""The state of a run: what, beside weights and optimiser, a resumed run goes on from."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PolicyState:
    """Where one policy that learns stands."""

    version: int = 0
    """The version that its weights were published as; 0 is the base model."""
    published: list[int] = field(default_factory=list)
    """The versions that the run's steps published, in order. Numbers of versions that were lost
    when the run was stopped are none of them."""

    def behind(self, version: int) -> int:
        """How many updates of the weights there were since `version`."""
        return sum(number > version for number in self.published)


@dataclass
class RunState:
    """Saved inside every checkpoint, so that it always belongs to its weights."""

    step: int = 0
    """Steps trained."""
    policies: dict[str, PolicyState] = field(default_factory=dict)
    """Of those that learn, by name."""
    position: int = 0
    """Place in the order of tasks (see `TaskOrder`)."""
    in_hand: list[int] = field(default_factory=list)
    """Places before it whose rollouts were under way or not yet learnt from (see `Flow`)."""
    train_seconds: float = 0.0
    tokens_generated: int = 0
    heldout_before: dict[str, Any] | None = None
    """Report of the base model on the held-out tasks."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every step trained, oldest first."""
    left_out: int = 0
    """Rollouts that came to no reward, over all steps."""

    def of(self, policy: str) -> PolicyState:
        """The state of one policy, at its beginning where nothing is known of it."""
        return self.policies.setdefault(policy, PolicyState())

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RunState":
        """The state that `to_json` made. Raises TypeError or KeyError for another object."""
        policies = {name: PolicyState(**state) for name, state in value["policies"].items()}
        return cls(**{**value, "policies": policies})
