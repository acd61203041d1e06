"""The forward pass over a row of packed trees: one hidden state per node, a logprob per entry.

Invariant: a node's hidden state depends on its ancestors alone, and the logprobs equal those of
each sequence in a row of its own, to rounding. Only the positions that predict a trainable token
go through the output head.

Where the weights are bfloat16, what one layer hands to the next (the residual stream) and the norms
are float32, and the matrix products bfloat16. Summed in bfloat16 over the layers, the stream alone
would cost about half of the learner's rounding error.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ray.learner.head import selected_logprobs
from lightning_ray.learner.tree_attention import filled_up, has_tree_attention, tree_blocks


def ancestor_mask(subtree_end: Tensor) -> Tensor:
    """bool[T, T]: [i, j] is true where node j is node i or an ancestor of it."""
    index = torch.arange(len(subtree_end), device=subtree_end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])


class PolicyModule(nn.Module):
    """A causal language model that is asked for the logprobs of given tokens at given nodes."""

    def __init__(self, model: nn.Module, logits_chunk: int, critic: bool = False) -> None:
        """`model` is a transformers causal language model; its attention is sdpa or `TREE`.

        With a `critic` the hidden states also give values; at first these are all 0.
        """
        super().__init__()
        self.model = model
        self.logits_chunk = logits_chunk
        self.value_head: nn.Linear | None = None
        if critic:
            width = model.get_input_embeddings().weight.shape[1]
            self.value_head = nn.Linear(width, 1, dtype=next(model.parameters()).dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        subtree_end: Tensor,
        logit_predictor: Tensor,
        logit_target: Tensor,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logprobs of the targets, entropy of the distributions they come from, and values.

        Args:
            input_ids: int64[T], with position_ids and subtree_end as in `packing.Row`.
            position_ids: int64[T]
            subtree_end: int64[T]
            logit_predictor: int64[M], nodes whose hidden state predicts.
            logit_target: int64[M], the token predicted.
            with_entropy: whether the entropies have a gradient.

        Returns:
            float32[M] natural logarithms at temperature 1, with gradient; float32[M] entropies in
            nats; and, with a critic, float32[M] values before each target, with gradient.
        """
        base = getattr(self.model, self.model.base_model_prefix)
        head = self.model.get_output_embeddings()
        mask: Any
        if has_tree_attention(self.model):
            input_ids, position_ids, subtree_end = filled_up(input_ids, position_ids, subtree_end)
            mask = tree_blocks(subtree_end)
        else:
            mask = ancestor_mask(subtree_end)[None, None]
        # Layers add to the stream in the type that it begins with.
        embedded = self.model.get_input_embeddings()(input_ids[None]).float()
        narrow = head.weight.dtype == torch.bfloat16
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=narrow):
            hidden = base(
                inputs_embeds=embedded,
                position_ids=position_ids[None],
                attention_mask=mask,
                use_cache=False,
            ).last_hidden_state[0]
        # On a GPU the backward pass of index_select adds in any order, and of an index in one.
        by_index = hidden.is_cuda
        predicting = (
            hidden[logit_predictor] if by_index else hidden.index_select(0, logit_predictor)
        )
        logprobs, entropy = selected_logprobs(
            predicting, head.weight, head.bias, logit_target, self.logits_chunk, with_entropy
        )
        if self.value_head is None:
            return logprobs, entropy, None
        values = self.value_head(predicting.to(self.value_head.weight.dtype))[:, 0].float()
        return logprobs, entropy, values
