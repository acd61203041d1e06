"""Cross-entropy, and the choice of a loss, against PyTorch's own and against parts of a batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.algorithms import LossConfig
from lightning_ray.algorithms.losses import Part, choose_loss, cross_entropy_loss

TOKENS = st.lists(
    st.tuples(st.integers(0, 4), st.floats(0.0, 2.0, width=32)), min_size=1, max_size=12
).filter(lambda tokens: sum(weight for _, weight in tokens) > 0.1)


@given(TOKENS, st.integers(0, 2**16))
def test_it_equals_pytorchs_with_weights_and_so_does_its_gradient(tokens, seed):
    targets = torch.tensor([target for target, _ in tokens])
    weights = torch.tensor([weight for _, weight in tokens])
    logits = torch.randn(len(tokens), 5, generator=torch.Generator().manual_seed(seed))
    logits.requires_grad_()
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (weights * each).sum() / weights.sum()
    mine = cross_entropy_loss(
        logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], weights, weights.sum().item()
    )
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    (wanted,) = torch.autograd.grad(expected, logits)
    (gradient,) = torch.autograd.grad(mine, logits)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["clipped", "cross_entropy", "own"])
@given(
    st.lists(st.tuples(*[st.floats(-3, 0, width=32)] * 2, st.floats(0, 2)), max_size=9), st.data()
)
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(kind, tokens, data):
    columns = list(zip(*tokens, strict=True)) if tokens else [()] * 3
    new, old, credit = (torch.tensor(column, dtype=torch.float32) for column in columns)
    weights = torch.full_like(credit, 1 / max(1, len(tokens)))
    total = max(float((weights * credit).sum()), 1e-3)
    own = (lambda new, old, credit: -(new - old).exp() * credit) if kind == "own" else None
    loss = choose_loss(LossConfig(kind="clipped" if own else kind), own, total)
    sequence = torch.zeros(len(tokens), dtype=torch.int64)
    cut = data.draw(st.integers(0, len(tokens)))
    parts = [
        loss(Part(*(column[part] for column in (new, old, credit, weights, sequence))))
        for part in (slice(0, cut), slice(cut, None))
    ]
    whole, metrics = loss(Part(new, old, credit, weights, sequence))
    assert whole.item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-3, abs=1e-4)
    for name in metrics.keys() - {"ratio_max"}:
        together = sum(part[name].item() for _, part in parts)
        assert metrics[name].item() == pytest.approx(together, rel=1e-3, abs=1e-4), name
