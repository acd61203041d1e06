"""The settings of the `evaluation` configuration group."""

from dataclasses import dataclass, field

from lightning_ray.errors import UserError

REWARD_PREFIX = "reward:"
PRICES = ("input_per_million", "output_per_million")
"""USD for a million prompt tokens, and for a million sampled ones."""


@dataclass
class MeasuresConfig:
    """Where the operator's measures are read from."""

    tool_discipline: str = "spans"
    """`spans`: the status of tool_call spans; `reward:NAME`: the mean of that reward."""
    rollback_words: list[str] = field(
        default_factory=lambda: ["rollback", "undo", "revert", "compensate"]
    )
    """Words in the name of a tool call or agent step that make it a rollback."""


@dataclass
class EvaluationConfig:
    """How a version is scored on tasks that are in no training step, and how spans are measured."""

    tasks: str | None = None
    """JSONL file of held-out tasks; null measures nothing before and after."""
    samples_per_task: int = 1
    """Rollouts per held-out task."""
    every: int = 0
    """Steps between scores on the held-out tasks while training goes on, by engines of their own
    that keep the version of that step; 0 for none but before and after."""
    reward: str = "reward"
    """The reward whose mean is the completion quality."""
    resolved_at: float = 1.0
    """A workflow is resolved when that reward is at least this."""
    prices: dict[str, dict[str, float]] = field(default_factory=dict)
    """By policy `input_per_million` and `output_per_million`, USD; for calls without `cost_usd`."""
    measures: MeasuresConfig = field(default_factory=MeasuresConfig)


def check_evaluation(config: EvaluationConfig) -> None:
    """Raises UserError for values outside their range."""
    if config.samples_per_task < 1:
        raise UserError(
            f"evaluation.samples_per_task={config.samples_per_task}: must be at least 1"
        )
    if config.every < 0:
        raise UserError(f"evaluation.every={config.every}: must be 0 or above")
    if config.every and config.tasks is None:
        raise UserError(
            f"evaluation.every={config.every}: there are no held-out tasks to score on; "
            "set evaluation.tasks=FILE.jsonl, or evaluation.every=0"
        )
    source = config.measures.tool_discipline
    if source != "spans" and not source.removeprefix(REWARD_PREFIX):
        raise UserError(f"evaluation.measures.tool_discipline={source}: name the reward")
    if source != "spans" and not source.startswith(REWARD_PREFIX):
        raise UserError(
            f"evaluation.measures.tool_discipline={source}: write `spans` or `reward:NAME`"
        )
    for policy, price in config.prices.items():
        if set(price) != set(PRICES):
            raise UserError(
                f"evaluation.prices.{policy} has {', '.join(price) or 'nothing'}: give it "
                f"{' and '.join(PRICES)}"
            )
        for name in PRICES:
            if price[name] < 0:
                raise UserError(
                    f"evaluation.prices.{policy}.{name}={price[name]}: a price is 0 USD or above"
                )
