"""The configuration of a training job: every room's settings, and the conductor's own."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from lightning_ray.agents import AgentConfig
from lightning_ray.algorithms import AlgorithmConfig
from lightning_ray.cluster import ClusterConfig, check_cluster
from lightning_ray.errors import UserError
from lightning_ray.evaluation import EvaluationConfig, check_evaluation
from lightning_ray.gateway import GatewayConfig, ServingConfig, check_gateway, make_roles
from lightning_ray.inference import InferenceConfig, check_inference
from lightning_ray.learner import LearnerConfig
from lightning_ray.policies import PolicyConfig, settle_policies
from lightning_ray.policies.handover import Way
from lightning_ray.rollouts import RolloutsConfig, check_rollouts
from lightning_ray.spans import SpansConfig, check_spans
from lightning_ray.tracking import TrackingConfig
from lightning_ray.training.own import Own, check_own, critic_rate, own_settings
from lightning_ray.trajectories import (
    CreditConfig,
    HygieneConfig,
    check_hygiene,
)


@dataclass
class TrainingConfig:
    """What the conductor does."""

    tasks: str = MISSING
    """JSONL file of training tasks."""
    steps: int = 24
    """Steps to train; a resumed run goes on up to the same number."""
    tasks_per_step: int = 8
    """Tasks of one step; each becomes algorithm.group_size rollouts."""
    staleness: int = 0
    """Most updates of the weights between a token and the step that learns from it. 0: the next
    rollouts begin when a step is done; above, they go on while the learner learns, and a group
    with older tokens is dropped."""
    past_the_end: bool = True
    """With staleness above 0, tasks beyond the last step are begun as well, so that the last steps
    do not wait for the slowest rollouts of the run; what is left of them at the end is cancelled:
    at most staleness x tasks_per_step tasks."""
    weights: Way = Way.auto
    """How new weights go from the learner to the engines: auto, disk, gpu_memory,
    shared_memory or object_store."""
    checkpoint_every: int = 10
    """Steps between checkpoints of weights, optimiser and run state."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are removed."""
    seed: int = 0
    """Seed of the order of tasks."""
    step_timeout_s: float = 1800.0
    """Longest that the learner may take for one step, seconds."""
    max_sequence_tokens: int = 0
    """Longest sequence that is learnt from, tokens; longer ones lose their last calls. 0: any."""
    max_restarts: int = 5
    """Times that parts may die and be replaced within one step; after more the run stops."""
    min_usable: float = 0.5
    """Share of a step's rollouts that must come to a reward; below it the run stops."""


@dataclass
class TrainConfig:
    """A training job."""

    name: str = "train"
    """Begins the run's id."""
    seed: int = 0
    """Seed of the order of tasks, of sampling and of the learner, unless they have their own."""
    output_dir: str = "outputs"
    """Folder that holds runs, each in a folder of its own, and MLflow's store."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    policies: dict[str, PolicyConfig] = field(default_factory=dict)
    """Policies by name, for agents that ask several; in place of `policy`. One or more learn."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    spans: SpansConfig = field(default_factory=SpansConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    hygiene: HygieneConfig = field(default_factory=HygieneConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def check_train(config: TrainConfig) -> None:
    """Checks every value that can be checked without loading anything. Raises UserError.

    Afterwards `config.policy` is the first trained policy, and `config.policies` holds every one.
    """
    config.policies = settle_policies(config.policy, config.policies)
    config.policy = trained_policies(config)[0]
    _check_roles(config)
    check_rooms(config)


def _check_roles(config: TrainConfig) -> None:
    """Where several policies learn, nobody can tell which one a role without a policy means."""
    trained = trained_policies(config)
    silent = [name for name, role in config.gateway.roles.items() if not role.policy]
    if len(trained) > 1 and (silent or not config.gateway.roles):
        names = ", ".join(policy.name for policy in trained)
        raise UserError(
            f"gateway.roles.{silent[0] if silent else 'NAME'}.policy: {names} are trained, so each "
            "role must say which policy answers it"
        )


def trained_policies(config: TrainConfig) -> list[PolicyConfig]:
    """The policies that learn, in order, once the policies are settled."""
    return [policy for policy in config.policies.values() if policy.train]


def settings_of(config: TrainConfig, policy: PolicyConfig) -> Own:
    """What a policy learns by. Raises UserError for settings of its own that cannot be."""
    return own_settings(policy, Own(config.algorithm, config.credit, config.learner))


def check_rooms(config: TrainConfig) -> None:
    """As `check_train`, once the policies are settled."""
    training = config.training
    for name in ("steps", "tasks_per_step", "checkpoint_every", "keep_checkpoints"):
        if getattr(training, name) < 1:
            raise UserError(f"training.{name}={getattr(training, name)}: must be at least 1")
    for name, seed in (("seed", config.seed), ("training.seed", training.seed)):
        if seed < 0:
            raise UserError(f"{name}={seed}: must be 0 or above")
    for name in ("staleness", "max_restarts"):
        if getattr(training, name) < 0:
            raise UserError(f"training.{name}={getattr(training, name)}: must be 0 or above")
    if training.step_timeout_s <= 0:
        raise UserError(f"training.step_timeout_s={training.step_timeout_s}: must be above 0")
    if not 0 <= training.min_usable <= 1:
        raise UserError(f"training.min_usable={training.min_usable}: must lie between 0 and 1")
    if not config.name or "/" in config.name:
        raise UserError(f"name={config.name!r}: it begins a folder's name; use letters and digits")
    if training.weights is Way.gpu_memory and not (
        config.learner.num_gpus > 0 and config.inference.num_gpus > 0
    ):
        raise UserError(
            "training.weights=gpu_memory needs learner and engines on a GPU: set learner=gpu and "
            "inference=gpu, or training.weights=auto"
        )
    if training.max_sequence_tokens < 0:
        raise UserError(
            f"training.max_sequence_tokens={training.max_sequence_tokens}: must be 0 (any) or more"
        )
    config.learner.critic_rate = critic_rate(config.algorithm)
    run = Own(config.algorithm, config.credit, config.learner)
    check_own(run)
    for policy in trained_policies(config):
        own_settings(policy, run)
    check_inference(config.inference)
    check_rollouts(config.rollouts)
    check_spans(config.spans)
    check_gateway(config.gateway)
    make_roles(config.gateway, config.policy.name, list(config.policies))
    check_hygiene(config.hygiene)
    check_evaluation(config.evaluation)
    check_cluster(config.cluster)
