"""Attention of packed trees by blocks: the same pairs, and on a GPU the same numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_support import HAS_GPU, load_plain, to_table, token_trees
from test_learner_worker import LOSS, PLAIN, largest_difference, on_policy, start, weights
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from lightning_ray.learner.forward import PolicyModule, ancestor_mask
from lightning_ray.learner.head import selected_logprobs
from lightning_ray.learner.packing import pack
from lightning_ray.learner.tree_attention import (
    BLOCK,
    filled_up,
    has_tree_attention,
    tree_blocks,
    use_tree_attention,
)

on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def rows_of(batch, tokens_per_row=4096):
    return [
        tuple(
            torch.from_numpy(one)
            for one in (
                row.input_ids,
                row.position_ids,
                row.subtree_end,
                row.logit_predictor,
                row.logit_target,
            )
        )
        for row in pack(batch, tokens_per_row).rows
    ]


def large_batch(prompts=3, samples=6):
    """Prompts of some 350 tokens with answers that branch once more: several blocks a row."""
    random = np.random.default_rng(2)
    rows = []
    for _ in range(prompts):
        prompt = random.integers(0, 256, int(random.integers(300, 420))).tolist()
        for _ in range(samples):
            turn = prompt + random.integers(0, 256, 20).tolist()
            for _ in range(2):
                tokens = turn + random.integers(0, 256, 15).tolist()
                trainable = [False] * len(turn) + [True] * 15
                rows.append({"token_ids": tokens, "trainable": trainable})
    return to_table(rows)


@given(token_trees())
def test_the_blocks_hold_the_pairs_of_the_mask_and_no_other(batch):
    for input_ids, position_ids, subtree_end, *_ in rows_of(batch):
        size = len(input_ids)
        ids, positions, ends = filled_up(input_ids, position_ids, subtree_end)
        assert len(ids) == len(positions) == len(ends) and len(ids) % BLOCK == 0
        assert len(ids) - size < BLOCK and torch.equal(ids[:size], input_ids)
        blocks = tree_blocks(ends)
        pairs = create_mask(blocks.mask_mod, 1, 1, len(ids), len(ids), device="cpu")[0, 0]
        assert torch.equal(pairs, ancestor_mask(ends))
        assert torch.equal(
            blocks.to_dense(),
            create_block_mask(blocks.mask_mod, 1, 1, len(ids), len(ids), device="cpu").to_dense(),
        )
        assert torch.equal(pairs[:size, :size], ancestor_mask(subtree_end))
        assert not pairs[:size, size:].any()
        # What fills the row up sees itself, so that no softmax is over nothing.
        assert torch.equal(pairs[size:], torch.eye(len(ids), dtype=torch.bool)[size:])


def test_the_blocks_of_a_long_row_are_those_of_the_mask():
    for _, _, ends, *_ in rows_of(large_batch(prompts=6)):
        ends = filled_up(ends, ends, ends)[2]
        mine = tree_blocks(ends)
        theirs = create_block_mask(mine.mask_mod, 1, 1, len(ends), len(ends), device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert torch.equal(mine.to_dense(), theirs.to_dense())
        assert int(mine.full_kv_num_blocks.sum()) > 0


def test_blocks_that_no_node_sees_are_left_out():
    """16 branches of 128 nodes on a stem of 128: of 289 blocks 16 lie on the stem, 17 on it."""
    size = 17 * BLOCK
    ends = torch.full((size,), size)
    for branch in range(16):
        begin = (branch + 1) * BLOCK
        ends[begin : begin + BLOCK] = begin + BLOCK
    assert int(tree_blocks(ends).to_dense().sum()) == 16 + 17


@given(st.integers(1, 3 * BLOCK))
def test_a_row_is_filled_up_to_whole_blocks(size):
    ends = torch.arange(1, size + 1)
    ids, positions, filled = filled_up(torch.ones(size, dtype=torch.int64), ends - 1, ends)
    assert len(ids) == len(positions) == len(filled) == -(-size // BLOCK) * BLOCK
    assert torch.equal(filled, torch.arange(1, len(filled) + 1))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_many_blocks_equals_attention_over_all_pairs(model_dir, dtype):
    dense, tree = (load_plain(model_dir).to("cuda", dtype) for _ in range(2))
    assert use_tree_attention(tree) and has_tree_attention(tree) and not has_tree_attention(dense)
    found = []
    for model in (dense, tree):
        module = PolicyModule(model, 256)
        logprobs = []
        for row in rows_of(large_batch()):
            new, *_ = module(*(one.cuda() for one in row))
            new.sum().backward()
            logprobs.append(new.detach())
        found.append((torch.cat(logprobs), {n: p.grad for n, p in model.named_parameters()}))
    (expected, gradients), (logprobs, mine) = found
    exact = dtype == torch.float32
    torch.testing.assert_close(
        logprobs, expected, rtol=0, atol=1e-4 if exact else 0.1, check_dtype=False
    )
    scale = max(gradient.norm().item() for gradient in gradients.values())
    for name, gradient in mine.items():
        apart = (gradient - gradients[name]).norm().item()
        assert apart <= (1e-5 if exact else 3e-2) * scale, name


@on_gpu
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_head_in_bfloat16_is_as_exact_as_float32(with_entropy):
    torch.manual_seed(1)
    hidden = torch.randn(70, 64, device="cuda") * 3
    weight = torch.randn(500, 64, device="cuda").bfloat16()
    target = torch.randint(0, 500, (70,), device="cuda")
    upstream = torch.randn(70, device="cuda")
    wide = hidden.double().requires_grad_()
    table = (wide @ weight.double().t()).log_softmax(dim=-1)
    expected = table.gather(1, target[:, None])[:, 0]
    entropy = -(table.exp() * table).sum(-1)
    loss = upstream.double() @ expected + (0.3 * entropy.sum() if with_entropy else 0.0)
    (wanted,) = torch.autograd.grad(loss, wide)
    hidden.requires_grad_()
    mine, found = selected_logprobs(hidden, weight, None, target, 32, with_entropy)
    torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.double(), entropy, rtol=1e-3, atol=1e-3)
    loss = upstream @ mine + (0.3 * found.sum() if with_entropy else 0.0)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert (grad - wanted).norm() <= 1e-2 * wanted.norm()


@on_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_take_the_same_step(model_dir, checkpointing):
    plain = start(model_dir)
    compiled = start(
        model_dir,
        dataclasses.replace(PLAIN, compile=True, activation_checkpointing=checkpointing),
        tokens_per_row=256,
    )
    batch = on_policy(plain, large_batch())
    before = weights(plain)
    for _ in range(2):
        reports = [worker.step(batch, LOSS) for worker in (plain, compiled)]
        assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-4, abs=1e-5)
    moved = largest_difference(weights(plain), before)
    assert moved > 1e-3
    assert largest_difference(weights(plain), weights(compiled)) <= 1e-4 * max(1.0, moved)
