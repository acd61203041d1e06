from dataclasses import asdict

import pytest

from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.training import TrainConfig, check_train

CALCULATOR = "experiment=calculator"


def compose(*overrides: str) -> TrainConfig:
    config = compose_config("train", TrainConfig, overrides)
    assert isinstance(config, TrainConfig)
    return config


def test_an_experiment_is_composed_into_its_typed_configuration() -> None:
    config = compose(CALCULATOR)
    check_train(config)
    assert config.agent.name == "calculator" and config.training.tasks.endswith("train.jsonl")
    assert resolved(config) == asdict(config)


def test_what_is_typed_stands_over_what_the_experiment_sets() -> None:
    config = compose(CALCULATOR, "algorithm.group_size=4", "training.steps=3", "cluster=ray")
    assert (config.algorithm.group_size, config.training.steps) == (4, 3)
    assert config.cluster.address == "auto"


def test_the_seed_of_a_run_is_that_of_its_parts_unless_they_have_their_own() -> None:
    config = compose(CALCULATOR, "seed=7", "learner.seed=9")
    assert (config.training.seed, config.inference.seed, config.learner.seed) == (7, 7, 9)


def test_further_engine_arguments_may_be_added() -> None:
    before = compose(CALCULATOR).inference.extra
    config = compose(CALCULATOR, "+inference.extra.swap_space=1")
    assert config.inference.extra == {**before, "swap_space": 1}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["algorithm.group_siz=4"], ["algorithm.group_siz", "AlgorithmConfig"]),
        (["trainig.steps=4"], ["trainig.steps", "TrainConfig"]),
        (["+training.step=4"], ["training.step", "TrainingConfig"]),
        (["+steps=4"], ["steps", "TrainConfig"]),
        (["training.steps=many"], ["training.steps", "'many'", "Integer"]),
        (["++training.steps=many"], ["training.steps", "'many'", "Integer"]),
        (["training.steps=null"], ["training.steps", "not Optional"]),
        (["training.steps=[3]"], ["training.steps", "Integer"]),
        (["agent.timeout_s=long"], ["agent.timeout_s", "'long'", "Float"]),
        (["gateway.models=gpt-4o-mini"], ["gateway.models"]),
        (["experiment=calculater"], ["experiment/calculater", "calculator"]),
        (["algorithm=gpro"], ["algorithm/gpro", "grpo"]),
        (["hygiene.leakage=ignore"], ["hygiene.leakage", "'ignore'", "drop, warn, stop, off"]),
        (["training.steps"], ["training.steps", "KEY=VALUE"]),
        (["=3"], ["=3", "KEY=VALUE"]),
        (["agent.command=[python"], ["agent.command=[python", "KEY=VALUE"]),
        (["agent=null"], ["NoneType"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(overrides: list[str], named: list[str]) -> None:
    experiment = [] if overrides[0].startswith("experiment") else [CALCULATOR]
    with pytest.raises(UserError) as raised:
        compose(*experiment, *overrides)
    message = str(raised.value)
    assert len(message.splitlines()) == 1 and len(message) < 300
    for name in named:
        assert name in message


@pytest.mark.parametrize("overrides", [[], ["training.tasks=tasks.jsonl"]])
def test_a_missing_value_is_named_with_the_experiments_there_are(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"^agent\.\w+: a value is needed.*calculator") as raised:
        compose(*overrides)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.steps=0", "training.steps=0"),
        ("training.min_usable=2", "training.min_usable=2"),
        ("training.weights=gpu_memory", "training.weights=gpu_memory"),
        ("learner.compile=true", "learner.compile=true"),
        ("name=a/b", "name='a/b'"),
        ("seed=-1", "seed=-1"),
        ("training.seed=-1", "training.seed=-1"),
        ("policy.keep_versions=0", "policy.keep_versions=0"),
        ("rollouts.num_workers=0", "rollouts.num_workers=0"),
        ("gateway.port=70000", "gateway.port=70000"),
        ("algorithm.group_size=1", "algorithm.group_size"),
        ("inference.dtype=int8", "inference.dtype=int8"),
        ("spans.segment_bytes=0", "spans.segment_bytes=0"),
        ("cluster.num_cpus=1", "cluster.num_cpus=1"),
        ("hygiene.max_duplicate_share=1.5", "hygiene.max_duplicate_share=1.5"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_starts(
    override: str, named: str
) -> None:
    with pytest.raises(UserError) as raised:
        check_train(compose(CALCULATOR, override))
    assert named in str(raised.value) and len(str(raised.value).splitlines()) == 1
