"""The policy losses, and all that goes with them, against one token at a time in plain Python."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_support import SEQUENCES, Token, part_of, slow_loss

from lightning_ray.algorithms import LossConfig, check_loss, gae
from lightning_ray.algorithms.config import (
    CORRECTIONS,
    ESTIMATORS,
    OLD,
    PLACES,
    CorrectionConfig,
    CriticConfig,
    KlConfig,
)
from lightning_ray.algorithms.losses import (
    choose_loss,
    policy_loss,
    token_advantages,
    whitens,
)
from lightning_ray.algorithms.surrogates import SURROGATES
from lightning_ray.errors import UserError


def allowed(kind: str, old: str, correction: str) -> bool:
    try:
        check_loss(LossConfig(kind=kind, old=old, correction=CorrectionConfig(correction)))
    except UserError:
        return False
    return True


COMBINATIONS = [
    combination
    for combination in itertools.product(SURROGATES, OLD, CORRECTIONS)
    if allowed(*combination)
]


def test_what_would_correct_twice_is_refused() -> None:
    refused = set(itertools.product(SURROGATES, OLD, CORRECTIONS)) - set(COMBINATIONS)
    truncating = ("token_truncate", "sequence_truncate")
    with_ratio = ("clipped", "sequence_clipped", "clipped_weight")
    assert refused == {
        *itertools.product(with_ratio, ["recorded"], truncating),
        ("sequence_clipped", "recorded", "token_mask"),
        ("sequence_clipped", "recorded", "icepop"),
    }


@given(
    SEQUENCES,
    st.sampled_from(COMBINATIONS),
    st.floats(0.05, 0.9),
    st.floats(0.05, 0.9),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(ESTIMATORS),
    st.sampled_from(PLACES),
    st.sampled_from([0.0, 0.1]),
)
def test_loss_and_gradient_equal_the_slow_ones(
    sequences, combination, low, high, coefficient, estimator, place, entropy
) -> None:
    kind, old, correction = combination
    config = LossConfig(
        kind=kind,
        epsilon_low=low,
        epsilon_high=high,
        old=old,
        correction=CorrectionConfig(correction, 0.5, 2.0),
        kl=KlConfig(coefficient, estimator, place),
        entropy_coefficient=entropy,
    )
    part = part_of(sequences)
    loss, metrics = policy_loss(part, config)
    slow = slow_loss(sequences, config)
    if slow.near_a_bound:
        return
    assert loss.item() == pytest.approx(slow.loss, rel=1e-3, abs=1e-3)
    assert metrics["masked"].item() == slow.masked
    loss.backward()
    gradient = [] if part.logprobs.grad is None else part.logprobs.grad.tolist()
    if kind != "sequence_clipped" or old == "current":
        assert gradient == pytest.approx(slow.gradient, rel=1e-3, abs=1e-3)
    if entropy:
        wanted = [-entropy * token.weight for one in sequences for token in one]
        assert part.entropy.grad.tolist() == pytest.approx(wanted, rel=1e-5)


@given(SEQUENCES, st.sampled_from(COMBINATIONS), st.integers(0, 4))
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(sequences, combination, cut) -> None:
    kind, old, correction = combination
    config = LossConfig(
        kind=kind,
        old=old,
        correction=CorrectionConfig(correction),
        kl=KlConfig(0.1, "k1", "reward"),
    )
    loss_of = choose_loss(config, None, 1.0)
    whole, metrics = loss_of(part_of(sequences))
    parts = [loss_of(part_of(some)) for some in (sequences[:cut], sequences[cut:])]
    total = sum(loss.item() for loss, _ in parts)
    assert whole.item() == pytest.approx(total, rel=1e-3, abs=1e-3)
    for name, value in metrics.items():
        found = [one[name].item() for _, one in parts]
        combined = max(found) if name == "ratio_max" else sum(found)
        assert value.item() == pytest.approx(combined, rel=1e-3, abs=1e-3), name


def test_credit_less_its_costs_is_whitened_where_that_is_asked_for() -> None:
    # One sequence: divergences 0.5 and 0.25, so 0.75 and 0.25 to go; times 2 off a credit of 3.
    tokens = [Token(-1.0, -1.0, 3.0, 0.5, -1.5, 0.0), Token(-1.0, -1.0, 3.0, 0.5, -1.25, 0.0)]
    part = part_of([tokens])
    config = LossConfig(kl=KlConfig(2.0, "k1", "reward", whiten=True))
    assert whitens(config) and not whitens(LossConfig(kl=KlConfig(0.0, "k1", "reward", True)))
    assert token_advantages(part, config).tolist() == pytest.approx([1.5, 2.5])
    loss, _ = policy_loss(type(part)(**{**vars(part), "whitening": (2.0, 0.5)}), config)
    assert loss.item() == pytest.approx(0.0)  # -0.5 * -1 - 0.5 * 1
    loss.backward()
    assert part.logprobs.grad.tolist() == pytest.approx([0.5, -0.5])


def test_a_sequence_ratio_is_the_geometric_mean_with_the_gradient_of_the_whole() -> None:
    # Equation 5 of GSPO on one sequence of two tokens, by automatic differentiation.
    tokens = [Token(-1.0, -1.2, 2.0, 0.5, 0.0, 0.0), Token(-0.5, -0.9, 2.0, 0.5, 0.0, 0.0)]
    part = part_of([tokens])
    loss, _ = policy_loss(part, LossConfig(kind="sequence_clipped", epsilon_high=1.0))
    loss.backward()
    new = torch.tensor([-1.0, -0.5], requires_grad=True)
    wanted = -((new - torch.tensor([-1.2, -0.9])).mean().exp() * 2.0)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert part.logprobs.grad.tolist() == pytest.approx(new.grad.tolist(), rel=1e-6)


def test_a_token_that_is_left_out_cannot_spoil_the_step() -> None:
    # A ratio beyond what a float holds, on a token that the correction leaves out.
    wild = Token(-1.0, -200.0, -1.0, 0.5, 0.0, 0.0)
    good = Token(-1.0, -1.0, 1.0, 0.5, 0.0, 0.0)
    for old in OLD:
        part = part_of([[good, wild], [good]])
        config = LossConfig(old=old, correction=CorrectionConfig("token_mask"))
        loss, metrics = policy_loss(part, config)
        loss.backward()
        assert loss.item() == pytest.approx(-1.0) and metrics["masked"].item() == 1
        assert part.logprobs.grad.tolist() == pytest.approx([-0.5, 0.0, -0.5])
        spoiled = policy_loss(part_of([[good, wild]]), LossConfig(old=old))[0]
        assert math.isfinite(spoiled.item()) == (old == "current")


def test_bfloat16_logprobs_are_computed_in_float32() -> None:
    token = Token(-1.0, -1.001, 1.0, 1.0, 0.0, 0.0)
    part = part_of([[token]])
    part = type(part)(**{**vars(part), "logprobs": part.logprobs.to(torch.bfloat16)})
    loss, _ = policy_loss(part, LossConfig())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(0.001), rel=1e-5)


@given(SEQUENCES, st.floats(0, 1), st.floats(0, 1))
def test_advantages_of_a_critic_are_the_sum_of_what_surprised_it(
    sequences, discount, trace
) -> None:
    part = part_of(sequences)
    values, rewards = part.reference, part.old_logprobs
    found = gae.advantages(values, rewards, part.sequence, discount, trace).tolist()
    for sequence in sequences:
        expected = [token.reference for token in sequence] + [0.0]
        for place in range(len(sequence)):
            # Equation 16 of GAE, term by term.
            wanted = sum(
                (discount * trace) ** ahead
                * (sequence[at].recorded + discount * expected[at + 1] - expected[at])
                for ahead, at in enumerate(range(place, len(sequence)))
            )
            assert found.pop(0) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert found == []


def test_a_critics_loss_is_that_of_the_surrogate_and_of_its_values() -> None:
    # Two tokens, worth 1 at the end, expected 0.5 and 0.25; lambda 1: advantages 0.5 and 0.75.
    tokens = [Token(-1.0, -1.0, 1.0, 0.5, 0.0, 0.0)] * 2
    part = part_of([tokens])
    values = torch.tensor([0.5, 0.25], requires_grad=True)
    config = LossConfig(critic=CriticConfig(coefficient=0.2, trace=1.0))
    given_values = {**vars(part), "values": values}
    loss, metrics = policy_loss(type(part)(**given_values), config)
    loss.backward()
    errors = 0.5 * (0.5**2 + 0.75**2)
    assert loss.item() == pytest.approx(-0.5 * (0.5 + 0.75) + 0.5 * 0.2 * errors)
    assert part.logprobs.grad.tolist() == pytest.approx([-0.25, -0.375])
    assert values.grad.tolist() == pytest.approx([-0.5 * 0.2 * 0.5, -0.5 * 0.2 * 0.75])
    assert metrics["value_error_sum"].item() == pytest.approx(0.5**2 + 0.75**2)
    # Whitened by mean 0.5 and deviation 0.25: advantages 0 and 1.
    whitened = {**given_values, "whitening": (0.5, 0.25)}
    loss, _ = policy_loss(type(part)(**whitened), config)
    assert loss.item() == pytest.approx(-0.5 + 0.5 * 0.2 * errors)
