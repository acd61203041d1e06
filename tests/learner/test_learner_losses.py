"""What goes with a policy loss, in real steps: divergence, entropy, corrections, packing."""

import dataclasses

import pytest
from test_learner_worker import PLAIN, largest_difference, on_policy, samples, start, weights

from lightning_ray.algorithms import LossConfig
from lightning_ray.algorithms.config import CorrectionConfig, CriticConfig, KlConfig
from lightning_ray.errors import UserError

STEPS = 4
SMALL = dataclasses.replace(PLAIN, learning_rate=0.02, adam_epsilon=1e-8)


def trained(model_dir, loss: LossConfig, steps: int = STEPS, **changes):
    """A worker after some steps on its own samples, and the report of the last."""
    worker = start(model_dir, SMALL, **changes)
    report = None
    for _ in range(steps):
        report = worker.step(on_policy(worker, samples()), loss)
        assert report.skipped is None
    return worker, report


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(kind="sequence_clipped", aggregation="sequence_mean"),
        LossConfig(kind="clipped_weight", epsilon_low=1.0, aggregation="group_mean"),
        LossConfig(kind="policy_gradient", correction=CorrectionConfig("sequence_truncate")),
        LossConfig(old="current", correction=CorrectionConfig("icepop"), entropy_coefficient=0.1),
        LossConfig(kl=KlConfig(0.3, "k1", "reward"), aggregation="fixed_length", fixed_length=20),
    ],
    ids=lambda loss: f"{loss.kind}-{loss.aggregation}",
)
def test_a_step_is_the_same_however_it_is_packed(model_dir, loss) -> None:
    batch, found = samples(), []
    for tokens_per_row in (512, 16):
        worker = start(model_dir, tokens_per_row=tokens_per_row)
        before = weights(worker)
        off_policy = on_policy(worker, batch)
        first = worker.step(off_policy, loss)
        # Once more on the same samples, which are now another policy's.
        second = worker.step(off_policy, loss)
        assert (first.rows, second.skipped) == (1 if tokens_per_row == 512 else 6, None)
        found.append((worker, first, second))
    (one, *reports), (other, *others) = found
    assert largest_difference(weights(one), before) > 1e-3
    assert largest_difference(weights(one), weights(other)) < 1e-4
    for mine, theirs in zip(reports, others, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-3, abs=1e-5)
        assert mine.masked_fraction == theirs.masked_fraction
        assert mine.divergence == pytest.approx(theirs.divergence, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("estimator", "place"), [("k3", "loss"), ("k2", "loss"), ("k1", "reward")])
def test_a_policy_that_pays_for_divergence_stays_nearer(model_dir, estimator, place) -> None:
    free = LossConfig(kind="policy_gradient", kl=KlConfig(1e-9, estimator, place))
    held = LossConfig(kind="policy_gradient", kl=KlConfig(2.0, estimator, place))
    worker = start(model_dir, SMALL)
    first = worker.step(on_policy(worker, samples()), free)
    assert first.divergence == pytest.approx(0.0, abs=1e-5)
    _, far = trained(model_dir, free)
    _, near = trained(model_dir, held)
    assert near.divergence < 0.7 * far.divergence


def test_the_reference_is_what_the_run_began_with_also_after_a_resume(model_dir, tmp_path) -> None:
    loss = LossConfig(kl=KlConfig(0.1))
    worker, _ = trained(model_dir, loss)
    worker.save_checkpoint(str(tmp_path / "saved"), {})
    going_on = worker.step(on_policy(worker, samples()), loss)
    resumed = start(model_dir, SMALL)
    resumed.load_checkpoint(str(tmp_path / "saved"))
    again = resumed.step(on_policy(resumed, samples()), loss)
    assert again.divergence == pytest.approx(going_on.divergence, rel=1e-4) and again.divergence > 0


def test_entropy_that_is_worth_something_is_kept(model_dir) -> None:
    _, plain = trained(model_dir, LossConfig())
    _, rich = trained(model_dir, LossConfig(entropy_coefficient=1.0))
    assert rich.entropy > plain.entropy + 0.01


def test_a_correction_leaves_out_what_is_too_far_and_says_how_much(model_dir) -> None:
    worker = start(model_dir, SMALL)
    batch = samples()
    # The samples' own logprobs are -5 each: no policy's, and far from the worker's.
    report = worker.step(batch, LossConfig(correction=CorrectionConfig("icepop", 0.99, 1.01)))
    assert 0.5 < report.masked_fraction <= 1.0
    report = worker.step(
        on_policy(worker, batch), LossConfig(correction=CorrectionConfig("icepop"))
    )
    assert report.masked_fraction == 0.0


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_critic_learns_what_attempts_are_worth_and_goes_on_after_a_resume(
    model_dir, tmp_path, zero_stage
) -> None:
    loss = LossConfig(critic=CriticConfig(coefficient=0.5))
    config = dataclasses.replace(SMALL, learning_rate=0.002, critic_rate=10.0)
    worker = start(model_dir, config, zero_stage=zero_stage)
    batch = samples()
    errors = []
    for _ in range(12):
        report = worker.step(on_policy(worker, batch), loss)
        assert report.skipped is None
        errors.append(report.value_error)
    # At first it expects 0, and every attempt is worth 1 or -1.
    assert errors[0] > 0.5 and errors[-1] < 0.5 * errors[0]
    worker.save_checkpoint(str(tmp_path / "saved"), {})
    resumed = start(model_dir, config, zero_stage=zero_stage)
    resumed.load_checkpoint(str(tmp_path / "saved"))
    fixed = on_policy(worker, batch)
    one, other = worker.step(fixed, loss), resumed.step(fixed, loss)
    assert one.value_error == pytest.approx(other.value_error, rel=1e-5) and one.value_error > 0
    assert largest_difference(weights(worker), weights(resumed)) == 0
    worker.publish(str(tmp_path / "published"))
    assert not any("value_head" in name for name in weights(worker))
    without = start(model_dir, SMALL, zero_stage=zero_stage)
    with pytest.raises(UserError, match=r"was saved with a critic"):
        without.load_checkpoint(str(tmp_path / "saved"))


def test_a_critics_step_is_the_same_however_it_is_packed(model_dir) -> None:
    loss = LossConfig(
        critic=CriticConfig(coefficient=0.5, discount=0.9), kl=KlConfig(0.1, "k1", "reward")
    )
    found = []
    for tokens_per_row in (512, 16):
        worker = start(model_dir, PLAIN, critic_rate=1.0, tokens_per_row=tokens_per_row)
        batch = on_policy(worker, samples())
        reports = [worker.step(batch, loss) for _ in range(2)]
        found.append((weights(worker), reports))
    (one, mine), (other, theirs) = found
    assert largest_difference(one, other) < 1e-4
    for report, again in zip(mine, theirs, strict=True):
        assert report.loss == pytest.approx(again.loss, rel=1e-3, abs=1e-4)
        assert report.value_error == pytest.approx(again.value_error, rel=1e-3)
