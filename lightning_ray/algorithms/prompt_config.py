"""The settings of prompt optimisation (Hydra group `prompt`).

Invariant: nothing here imports gepa, so a configuration is checked in milliseconds.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from lightning_ray.errors import UserError


class Proposer(StrEnum):
    """Who writes the next prompt."""

    demonstrations = "demonstrations"
    """Exchanges of good rollouts are put before the agent's first message; the text stays."""
    reflection = "reflection"
    """A language model reads what happened and writes the text anew."""


@dataclass
class DemonstrationsConfig:
    """Demonstrations taken from good rollouts."""

    max: int = 4
    """Most exchanges in one prompt."""
    bootstrap: int = 32
    """Rollouts of the agent's own prompt, before the search, to take the first exchanges from."""
    top_share: float = 0.1
    """Exchanges are taken from this share of the rollouts, those of the highest reward."""
    max_characters: int = 4000
    """Longest exchange, question and answer together."""


@dataclass
class ReflectionConfig:
    """The language model that writes prompts, behind any OpenAI-compatible endpoint."""

    base_url: str = ""
    """What a client of that API would be given, `/v1` included: https://HOST/v1"""
    model: str = ""
    """The model's name there."""
    api_key_env: str | None = None
    """Environment variable that holds its key, read where the job is started; null sends none."""
    temperature: float | None = 1.0
    """Of its answers; null leaves it to the endpoint."""
    max_tokens: int | None = None
    """Longest answer; null leaves it to the endpoint."""
    timeout_s: float = 180.0
    """Longest that one answer may take, seconds."""


@dataclass
class PromptConfig:
    """What is searched, and how long."""

    proposer: Proposer = Proposer.demonstrations
    """Who writes the next prompt."""
    policy: str | None = None
    """Whose system prompt is optimised; null is the only policy, or the one that is trained."""
    seed: str | None = None
    """The agent's own system prompt, or a part of it; null finds it in a few rollouts."""
    name: str | None = None
    """Name in MLflow's prompt registry; null is POLICY-prompt."""
    max_rollouts: int = 600
    """Rollouts of the search; scoring on held-out tasks comes on top."""
    minibatch: int = 12
    """Training tasks on which a prompt and its successors are compared."""
    proposals: int = 4
    """Successors of one prompt tried side by side; the best that is better goes on."""
    validation: int = 32
    """Training tasks, set apart, on which prompts that go on are scored."""
    target: float | None = None
    """Validation score at which the search ends; null goes on until the budget is spent."""
    min_usable: float = 0.5
    """Share of the rollouts under a prompt that must come to a reward; below it the job stops."""
    demonstrations: DemonstrationsConfig = field(default_factory=DemonstrationsConfig)
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)

    @property
    def first_rollouts(self) -> int:
        """Rollouts before the first successor is tried."""
        return self.validation + (
            self.demonstrations.bootstrap if self.proposer is Proposer.demonstrations else 0
        )

    @property
    def round_rollouts(self) -> int:
        """Most rollouts of one round: a prompt, its successors, and the best one's validation."""
        return self.minibatch * (1 + self.proposals) + self.validation


def check_prompt(config: PromptConfig) -> None:
    """Raises UserError for values outside their range, or a reflection without an endpoint."""
    shown = config.demonstrations
    numbers = {name: getattr(config, name) for name in ("minibatch", "proposals", "validation")}
    numbers |= {f"demonstrations.{n}": getattr(shown, n) for n in ("max", "bootstrap")}
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"prompt.{name}={number}: must be at least 1")
    for name, share in (
        ("min_usable", config.min_usable),
        ("demonstrations.top_share", shown.top_share),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"prompt.{name}={share}: must lie between 0 and 1")
    needed = config.first_rollouts + config.round_rollouts
    if config.max_rollouts < needed:
        raise UserError(
            f"prompt.max_rollouts={config.max_rollouts}: one round takes {needed} with the present "
            "settings; raise it, or lower prompt.validation, prompt.minibatch or prompt.proposals"
        )
    if config.seed is not None and not config.seed.strip():
        raise UserError("prompt.seed is empty: name the agent's system prompt, or leave it out")
    if config.proposer is Proposer.reflection:
        _check_reflection(config.reflection)


def _check_reflection(config: ReflectionConfig) -> None:
    if not config.base_url.startswith(("http://", "https://")):
        raise UserError(
            f"prompt.reflection.base_url={config.base_url or 'null'}: reflection needs a language "
            "model; name its OpenAI-compatible endpoint, http(s)://HOST/v1, or use "
            "prompt=demonstrations, which needs none"
        )
    if not config.model:
        raise UserError(
            "prompt.reflection.model: name the model to ask at prompt.reflection.base_url"
        )
    if config.timeout_s <= 0:
        raise UserError(f"prompt.reflection.timeout_s={config.timeout_s}: must be above 0")
