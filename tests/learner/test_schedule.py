"""The learning rate as a function of the step."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_learner_worker import LOSS, PLAIN, on_policy, samples, start

from lightning_ray.errors import UserError
from lightning_ray.learner import LearnerConfig, check_learner
from lightning_ray.learner.schedule import learning_rate

SCHEDULES = st.builds(
    LearnerConfig,
    learning_rate=st.floats(1e-6, 1.0),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup_steps=st.integers(0, 10),
    schedule_steps=st.integers(11, 50),
    final_rate=st.floats(0, 1),
)


@given(SCHEDULES)
def test_it_rises_to_its_highest_and_falls_to_its_lowest(config: LearnerConfig) -> None:
    check_learner(config)
    rates = [learning_rate(config, step) for step in range(1, 61)]
    highest, warmup = config.learning_rate, config.warmup_steps
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == pytest.approx([highest * (n + 1) / warmup for n in range(warmup)])
    assert all(0 <= rate <= highest * (1 + 1e-9) for rate in rates)
    assert all(one >= other - 1e-12 for one, other in itertools.pairwise(falling))
    lowest = highest if config.schedule == "constant" else highest * config.final_rate
    ended = rates[config.schedule_steps - 1 :]
    assert ended == pytest.approx([lowest] * len(ended))


def test_numbers_worked_by_hand() -> None:
    config = LearnerConfig(learning_rate=1.0, schedule_steps=10, warmup_steps=2, final_rate=0.2)
    linear = dataclasses.replace(config, schedule="linear")
    assert [learning_rate(linear, step) for step in (1, 2, 6, 10)] == pytest.approx(
        [0.5, 1.0, 0.6, 0.2]
    )
    cosine = dataclasses.replace(config, schedule="cosine")
    assert [learning_rate(cosine, step) for step in (4, 6, 8)] == pytest.approx(
        [0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5)]
    )


@pytest.mark.parametrize(
    "config",
    [
        LearnerConfig(schedule="step"),
        LearnerConfig(schedule="cosine"),
        LearnerConfig(schedule="linear", schedule_steps=5, warmup_steps=5),
        LearnerConfig(warmup_steps=-1),
        LearnerConfig(final_rate=1.5),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(config: LearnerConfig) -> None:
    with pytest.raises(UserError, match=r"^learner\."):
        check_learner(config)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_step_is_taken_with_it_and_a_resumed_run_goes_on_in_it(
    model_dir, tmp_path, zero_stage
) -> None:
    schedule = {"schedule": "linear", "schedule_steps": 4, "warmup_steps": 2}
    worker = start(model_dir, PLAIN, zero_stage=zero_stage, **schedule)
    batch = on_policy(worker, samples())
    assert [worker.step(batch, LOSS).learning_rate for _ in range(2)] == [0.25, 0.5]
    worker.save_checkpoint(str(tmp_path / "saved"), {})
    resumed = start(model_dir, PLAIN, zero_stage=zero_stage, **schedule)
    resumed.load_checkpoint(str(tmp_path / "saved"))
    assert [resumed.step(batch, LOSS).learning_rate for _ in range(2)] == [0.25, 0.0]
