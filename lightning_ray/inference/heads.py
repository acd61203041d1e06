"""Logits in float32 of a model in bfloat16, on a processor: the head's weights are cast once.

An engine that a learner learns from computes logits in float32 (`head_dtype`). Only GPUs have a
product of bfloat16 matrices that adds up in float32; on a processor vLLM 0.32 casts all weights of
the head anew for every token, which takes longer than the rest of a small model. Here they are cast
and packed for oneDNN when they are first needed, and `forget` is called when they are replaced.

What is kept takes as much memory as a cast does: 4 bytes for each number of the head.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch

_packed: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()
"""Of each head what oneDNN multiplies by."""


def keep_heads() -> None:
    """Has vLLM in this process compute heads so, from now on."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    theirs = LogitsProcessor._apply_head
    if getattr(theirs, "keeps_heads", False) or not ops._supports_onednn:
        return

    def apply_head(
        self: LogitsProcessor,
        lm_head: Any,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        # Any other method keeps no plain weights; in the same type vLLM has them packed already.
        ours = (
            self.head_dtype == torch.float32
            and hidden_states.dtype != torch.float32
            and hidden_states.device.type == "cpu"
            and isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod)
        )
        if not ours:
            return theirs(self, lm_head, hidden_states, embedding_bias)
        if lm_head not in _packed:
            _packed[lm_head] = ops.create_onednn_mm(lm_head.weight.float().t())
        logits: torch.Tensor = ops.onednn_mm(_packed[lm_head], hidden_states.float(), None)
        return logits if embedding_bias is None else logits + embedding_bias.float()

    apply_head.keeps_heads = True  # type: ignore[attr-defined]
    LogitsProcessor._apply_head = apply_head


def forget() -> None:
    """The weights of every head have changed."""
    _packed.clear()
