"""The heart of the learner: the packed computation equals the plain one, in float32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_support import DEVICES, load_plain, plain_loss, token_trees

from lightning_ray.algorithms import LossConfig
from lightning_ray.algorithms.losses import Part, policy_loss
from lightning_ray.learner.forward import PolicyModule, ancestor_mask
from lightning_ray.learner.head import selected_logprobs
from lightning_ray.learner.packing import pack
from lightning_ray.learner.tree_attention import use_tree_attention


def packed_loss(module: PolicyModule, packed, config: LossConfig):
    """The sum of the rows' losses, and the logprobs of the batch's trainable tokens."""
    device = next(module.parameters()).device
    total = torch.zeros((), device=device)
    logprobs = np.full(packed.trainable_tokens, np.nan, np.float32)
    for row in packed.rows:
        new, entropy, _ = module(
            *(
                torch.from_numpy(array).to(device)
                for array in (
                    row.input_ids,
                    row.position_ids,
                    row.subtree_end,
                    row.logit_predictor,
                    row.logit_target,
                )
            )
        )
        assert entropy.requires_grad is False
        chosen = new[torch.from_numpy(row.entry).to(device)]
        numbers = (row.old_logprobs, row.advantages, row.weights, row.sequence)
        part = Part(chosen, *(torch.from_numpy(one).to(device) for one in numbers))
        total = total + policy_loss(part, config)[0]
        logprobs[row.token] = chosen.detach().cpu().numpy()
    return total, logprobs


@pytest.fixture(scope="module", params=DEVICES)
def models(model_dir, request):
    """The model twice: for the plain computation, and with the attention that the learner uses."""
    plain, packed = (load_plain(model_dir).to(request.param) for _ in range(2))
    if request.param == "cuda":
        assert use_tree_attention(packed)
    return plain, packed


@settings(max_examples=40, deadline=None)
@given(
    batch=token_trees(vocabulary=4),
    tokens_per_row=st.sampled_from([1, 8, 512]),
    chunk=st.sampled_from([1, 3, 512]),
    aggregation=st.sampled_from(["token_mean", "sequence_mean"]),
)
def test_loss_logprobs_and_every_gradient_equal_the_unshared_ones(
    models, batch, tokens_per_row, chunk, aggregation
):
    plain, shared_model = models
    low = high = 0.9  # most tokens keep a gradient
    config = LossConfig(epsilon_low=low, epsilon_high=high, aggregation=aggregation)
    packed = pack(batch, tokens_per_row, config)
    plain.zero_grad()
    loss, logprobs = plain_loss(plain, batch, aggregation, low, high)
    if not packed.rows:
        return
    loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    shared_model.zero_grad()
    shared, shared_logprobs = packed_loss(PolicyModule(shared_model, chunk), packed, config)
    shared.backward()
    learnable = shared_logprobs[~np.isnan(shared_logprobs)]
    np.testing.assert_allclose(learnable, np.concatenate(logprobs), rtol=1e-5, atol=1e-5)
    assert shared.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    # Relative to the size of the whole gradient: single entries may cancel to rounding error.
    scale = max(grad.norm().item() for grad in expected.values()) + 1e-6
    for name, parameter in shared_model.named_parameters():
        difference = (parameter.grad - expected[name]).norm().item()
        assert difference <= 1e-5 * scale, name


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 10), st.booleans())
def test_the_head_equals_log_softmax_whatever_the_chunk(size, chunk, with_bias):
    torch.manual_seed(size)
    hidden = torch.randn(size, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    bias = torch.randn(20, requires_grad=True) if with_bias else None
    target = torch.randint(0, 20, (size,))
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    table = torch.nn.functional.linear(hidden, weight, bias).log_softmax(dim=-1)
    expected = table.gather(1, target[:, None])[:, 0]
    mine, entropy = selected_logprobs(hidden, weight, bias, target, chunk)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1), rtol=1e-4, atol=1e-5)
    upstream = torch.randn(size)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for grad, other in zip(torch.autograd.grad(mine, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)
    # Where the entropy is part of the loss, its gradient as well.
    table = torch.nn.functional.linear(hidden, weight, bias).log_softmax(dim=-1)
    both = upstream @ table.gather(1, target[:, None])[:, 0] - 0.3 * (table.exp() * table).sum()
    wanted = torch.autograd.grad(both, inputs)
    mine, entropy = selected_logprobs(hidden, weight, bias, target, chunk, with_entropy=True)
    grads = torch.autograd.grad(upstream @ mine + 0.3 * entropy.sum(), inputs)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_the_mask_lets_a_node_see_its_ancestors_only():
    # 0 has the children 1 and 3; 2 is a child of 1; 4 begins another tree.
    mask = ancestor_mask(torch.tensor([4, 3, 3, 4, 5]))
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[0], [0, 1], [0, 1, 2], [0, 3], [4]]
