"""The configuration of supervised tuning: which samples, and how long they are trained on."""

import math
from dataclasses import dataclass, field

from lightning_ray.algorithms import LossConfig, check_loss
from lightning_ray.errors import UserError
from lightning_ray.training.config import (
    TrainConfig,
    check_train,
    settings_of,
    trained_policies,
)


@dataclass
class SamplesConfig:
    """Which attempts of earlier runs are learnt from; see `selection`."""

    runs: list[str] = field(default_factory=list)
    """Runs by id or path, or folders of spans; on the command line `from=RUN,RUN`."""
    min_reward: float | None = None
    """Attempts whose reward is at least this."""
    reward: str = "reward"
    """The name of the reward that `min_reward` looks at."""
    where: str | None = None
    """Attempts for which this SQL condition on the table `attempts` holds."""
    sql: str | None = None
    """A SQL query over `spans` and `attempts` with a column `attempt_id`; stands alone."""
    policy: str | None = None
    """Whose calls are learnt; null is `policy.name`. Calls of others are context."""
    role: str | None = None
    """Only calls that asked for this model name are learnt; null takes all."""
    deduplicate: bool = True
    """Learn a sample once, however often the same tokens were sampled."""
    max_samples: int | None = None
    """At most so many samples, drawn with `finetuning.seed`; null takes all."""


@dataclass
class FinetuningConfig:
    """How the chosen samples are trained on."""

    epochs: int = 3
    """Times that each sample is seen; each epoch ends with a version."""
    batch_size: int = 32
    """Samples of one step, at most; an epoch is cut into equal batches."""
    aggregation: str = "token_mean"
    """As `algorithm.loss.aggregation`: what a token of a long sample weighs."""
    seed: int = 0
    """Seed of the order of samples, and of `samples.max_samples`."""


@dataclass
class FinetuneConfig(TrainConfig):
    """A job of supervised tuning: a training job's parts, and where its samples come from."""

    samples: SamplesConfig = field(default_factory=SamplesConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)

    @property
    def loss(self) -> LossConfig:
        """Cross-entropy, as the learner is told of it."""
        return LossConfig(kind="cross_entropy", aggregation=self.finetuning.aggregation)


def check_finetune(config: FinetuneConfig) -> None:
    """Checks every value that can be checked without reading spans. Raises UserError."""
    samples, tuning = config.samples, config.finetuning
    check_train(config)
    if len(learning := trained_policies(config)) > 1:
        raise UserError(
            f"{' and '.join(policy.name for policy in learning)} would be tuned; one at a time: "
            "set policies.NAME.train=false for the others"
        )
    config.learner = settings_of(config, config.policy).learner
    config.learner.critic_rate = 0.0
    # An epoch is scored before the next begins, by the engines that there are.
    config.evaluation.every = 0
    config.policy.algorithm, config.policy.learner = {}, {}
    if not samples.runs:
        raise UserError("from= is needed: the run, or runs, whose spans are learnt from")
    chosen = {"min_reward": samples.min_reward, "where": samples.where, "sql": samples.sql}
    given = [name for name, value in chosen.items() if value is not None]
    if not given:
        raise UserError(
            "say which attempts are learnt from: min_reward=1.0, where='SQL condition' or "
            "sql='SELECT attempt_id FROM ...'"
        )
    if "sql" in given and len(given) > 1:
        raise UserError(f"sql= stands alone: put what {given[0]}= says into the query")
    if samples.min_reward is not None and not math.isfinite(samples.min_reward):
        raise UserError(f"min_reward={samples.min_reward}: must be a finite number")
    if samples.max_samples is not None and samples.max_samples < 1:
        raise UserError(f"samples.max_samples={samples.max_samples}: must be at least 1")
    for name in ("epochs", "batch_size"):
        if getattr(tuning, name) < 1:
            raise UserError(f"finetuning.{name}={getattr(tuning, name)}: must be at least 1")
    if tuning.seed < 0:
        raise UserError(f"finetuning.seed={tuning.seed}: must be 0 or above")
    try:
        check_loss(config.loss)
    except UserError as error:
        raise UserError(str(error).replace("algorithm.loss.", "finetuning.")) from error
    if config.evaluation.tasks is not None and not config.agent.name:
        raise UserError(
            "evaluation.tasks is set, so an agent is needed to score them: set agent=, or "
            "experiment=, or evaluation.tasks=null"
        )
