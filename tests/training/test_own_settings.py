"""What each policy learns by, where several are trained, and the mistakes in saying so."""

import pytest

from lightning_ray.algorithms import AlgorithmConfig
from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.training import TrainConfig, check_train
from lightning_ray.training.config import settings_of, trained_policies
from lightning_ray.training.finetuning import FinetuneConfig, check_finetune
from lightning_ray.training.parts import needs_of

BOTH = "experiment=planner_and_solver"


def settled(*overrides: str) -> TrainConfig:
    config: TrainConfig = compose_config("train", TrainConfig, [BOTH, *overrides])
    check_train(config)
    return config


def test_a_policy_has_settings_of_its_own_and_the_runs_for_the_rest() -> None:
    config = settled(
        # All the settings of one of the files of the group, as the run itself would take them.
        "+algorithm@policies.solver.algorithm=rloo",
        "+policies.solver.learner.learning_rate=3e-5",
        "+policies.planner.learner.lora.rank=4",
    )
    planner, solver = (settings_of(config, policy) for policy in trained_policies(config))
    assert (planner.algorithm, planner.credit) == (config.algorithm, config.credit)
    assert (planner.learner.lora.rank, solver.learner.lora.rank) == (4, 0)
    assert solver.learner.learning_rate == 3e-5 != planner.learner.learning_rate
    assert (solver.algorithm.name, solver.algorithm.loss.kind) == ("rloo", "policy_gradient")
    assert solver.algorithm.group_size == config.algorithm.group_size
    assert solver.credit.rewards == {"reward": 0.0, "exact": 1.0}


def test_another_algorithm_begins_with_the_defaults_and_not_with_the_runs_settings() -> None:
    config = settled(
        "algorithm=dr_grpo", "algorithm.group_size=4", "+algorithm@policies.solver.algorithm=grpo"
    )
    planner, solver = (settings_of(config, policy) for policy in trained_policies(config))
    assert (planner.algorithm.name, planner.algorithm.normalize) == ("dr_grpo", "none")
    assert solver.algorithm == AlgorithmConfig(group_size=4)
    # The same one takes over what the run's is set to.
    config = settled("algorithm.min_group=3", "+policies.solver.algorithm.std_epsilon=0.5")
    solver = settings_of(config, config.policies["solver"])
    assert (solver.algorithm.min_group, solver.algorithm.std_epsilon) == (3, 0.5)


def test_only_the_one_with_a_critic_learns_values() -> None:
    settings = ["name=ppo", "normalize=none", "loss.critic.coefficient=0.1", "loss.critic.rate=4"]
    config = settled(*(f"+policies.planner.algorithm.{setting}" for setting in settings))
    planner, solver = (settings_of(config, policy) for policy in trained_policies(config))
    assert (planner.learner.critic_rate, solver.learner.critic_rate) == (4.0, 0.0)


def test_each_policy_that_learns_needs_a_learner_and_each_an_engine() -> None:
    one = compose_config("train", TrainConfig, ["experiment=planner", "learner.num_cpus=3"])
    check_train(one)
    two = settled("learner.num_cpus=3", "+policies.solver.learner.num_ranks=2")
    assert needs_of(two).cpus - needs_of(one).cpus == 6
    assert needs_of(two, learn=False) == needs_of(one, learn=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+policies.solver.algorithm.nam=rloo"], "policies.solver.algorithm: Key 'nam' not in"),
        (
            ["+policies.solver.algorithm.name=rloo"],
            "policies.solver: algorithm.normalize=group: rloo",
        ),
        (["+policies.solver.credit.discount=2"], "policies.solver: credit.discount: 2"),
        (["+policies.solver.learner.learning_rate=fast"], "policies.solver.learner: Value 'fast'"),
        (["+policies.solver.algorithm.group_size=4"], "all policies learn from the same rollouts"),
        (["gateway.roles.solver.policy="], "gateway.roles.solver.policy: planner, solver are"),
        (
            ["policies.planner.train=false", "policies.solver.train=false"],
            "no policy of planner, solver is to be trained; set policies.NAME.train=true",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(overrides, message) -> None:
    with pytest.raises(UserError) as raised:
        settled(*overrides)
    assert message in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_one_policy_is_tuned_at_a_time() -> None:
    words = [BOTH, "samples.runs=[run]", "samples.min_reward=1"]
    config: FinetuneConfig = compose_config("finetune", FinetuneConfig, words)
    with pytest.raises(UserError, match="planner and solver would be tuned; one at a time"):
        check_finetune(config)
    alone = ["policies.solver.train=false", "+policies.planner.learner.learning_rate=7e-6"]
    config = compose_config("finetune", FinetuneConfig, [*words, *alone])
    check_finetune(config)
    assert settings_of(config, config.policy).learner.learning_rate == 7e-6
