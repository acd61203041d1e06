"""Attention of packed trees on a GPU, by FlexAttention: blocks that no node sees cost nothing.

A row of T nodes has T x T pairs, of which a batch with many branches needs few. The kernels visit
blocks of 128 x 128 pairs and leave out those that the tree rules out; nothing of size T x T stays.

FlexAttention: Dong et al., 2024, arXiv:2412.05496.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

TREE = "lightning_ray_tree"
"""What transformers knows this attention as."""

BLOCK = 128
"""Rows are filled up to whole blocks, so that few lengths are compiled for."""


LEAST_WIDTH = 16
"""Numbers of a head that FlexAttention's kernels take at least."""


def use_tree_attention(model: PreTrainedModel) -> bool:
    """Sets the model's attention to this one; false where that cannot be.

    A model may have only an attention of its own, or heads that are too narrow for the kernels.
    """
    about = model.config
    width = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    if not model._supports_attention_backend or width < LEAST_WIDTH:
        return False
    AttentionInterface.register(TREE, tree_attention)
    model.set_attn_implementation(TREE)
    return True


def has_tree_attention(model: Any) -> bool:
    """Whether the model's attention takes what `tree_blocks` makes."""
    return bool(model.config._attn_implementation == TREE)


def filled_up(input_ids: Tensor, position_ids: Tensor, subtree_end: Tensor) -> tuple[Tensor, ...]:
    """The three, int64[T] each, with nodes that see themselves alone up to whole blocks."""
    size = len(input_ids)
    missing = -size % BLOCK
    if not missing:
        return input_ids, position_ids, subtree_end
    index = torch.arange(size + 1, size + 1 + missing, device=subtree_end.device)
    nothing = torch.zeros_like(index)
    return (
        torch.cat([input_ids, nothing]),
        torch.cat([position_ids, nothing]),
        torch.cat([subtree_end, index]),
    )


def tree_blocks(subtree_end: Tensor) -> BlockMask:
    """Which blocks of pairs a row has, and within them which pairs.

    Node i sees node j where `forward.ancestor_mask` is true at [i, j]. Later nodes see all of a
    block of which even the shortest subtree ends behind them, and none of it where the longest one
    does not reach them; so nothing is made that has T x T entries.

    Args:
        subtree_end: int64[T] of a row that was filled up.
    """

    def sees(_batch: Tensor, _head: Tensor, node: Tensor, other: Tensor) -> Tensor:
        return (other <= node) & (node < subtree_end[other])

    ends = subtree_end.view(-1, BLOCK)
    count = len(ends)
    block = torch.arange(count, device=subtree_end.device)
    later = block[:, None] > block
    some = later & (ends.amax(dim=1) > block[:, None] * BLOCK)
    whole = later & (ends.amin(dim=1) >= (block[:, None] + 1) * BLOCK)
    in_part = (some & ~whole) | (block[:, None] == block)
    return BlockMask.from_kv_blocks(
        *_listed(in_part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool[n, n], for each row: how many are true, int32[1, 1, n], and which, those first."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1)[None, None].int(), order[None, None].int()


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention.

    Args:
        module: the layer; not needed.
        query: float[1, heads, T, D]
        key: float[1, key heads, T, D]; heads is a multiple of key heads.
        value: like `key`; its type is that of the products.
        attention_mask: of `tree_blocks`.
        scaling: what the products are multiplied by; 1 / sqrt(D) where it is None.

    Returns:
        float[1, T, heads, D] and None, for the weights, which never exist.
    """
    # Rotated in float32, as the residual stream is; the products are in the weights' type.
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    found = attend(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
