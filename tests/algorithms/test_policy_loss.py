"""The clipped loss against one token at a time in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.algorithms.losses import clipped_policy_loss

NUMBER = st.floats(-3, 3, width=32)
TOKENS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER, st.floats(0, 2, width=32)), max_size=12)


def tensors(tokens: list[tuple[float, ...]]) -> list[torch.Tensor]:
    columns = list(zip(*tokens, strict=True)) if tokens else [()] * 4
    return [torch.tensor(column, dtype=torch.float32) for column in columns]


@settings(deadline=None)
@given(TOKENS, st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_loss_gradient_and_metrics_equal_the_slow_ones(tokens, low, high):
    new, old, advantages, weights = tensors(tokens)
    new.requires_grad_()
    loss, metrics = clipped_policy_loss(new, old, advantages, weights, low, high)
    loss.backward()
    expected, gradient, clipped, ratios = 0.0, [], 0, []
    for n, o, a, w in tokens:
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 1 - low), 1 + high)
        inactive = bounded * a < ratio * a
        expected -= w * min(ratio * a, bounded * a)
        gradient.append(0.0 if inactive else -w * a * ratio)
        clipped += inactive
        ratios.append(ratio)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    near_the_edge = any(
        abs(ratio - edge) < 1e-4 for ratio in ratios for edge in (1 - low, 1 + high)
    )
    if not near_the_edge:
        assert new.grad.tolist() == pytest.approx(gradient, rel=1e-4, abs=1e-4)
        assert metrics["clipped"].item() == clipped
    assert metrics["ratio_sum"].item() == pytest.approx(sum(ratios), rel=1e-4)
    assert metrics["ratio_max"].item() == pytest.approx(max(ratios, default=0.0), rel=1e-4)
    difference = [n - o for n, o, _, _ in tokens]
    assert metrics["difference_sum"].item() == pytest.approx(sum(difference), rel=1e-3, abs=1e-3)


@settings(deadline=None)
@given(TOKENS, st.integers(0, 12))
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(tokens, cut):
    whole, _ = clipped_policy_loss(*tensors(tokens), 0.2, 0.2)
    parts = [
        clipped_policy_loss(*tensors(part), 0.2, 0.2)[0] for part in (tokens[:cut], tokens[cut:])
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-4, abs=1e-4)


def test_bfloat16_logprobs_are_computed_in_float32():
    new = torch.tensor([-1.0], dtype=torch.bfloat16)
    loss, _ = clipped_policy_loss(
        new, torch.tensor([-1.001]), torch.ones(1), torch.ones(1), 0.2, 0.2
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(0.001), rel=1e-5)
