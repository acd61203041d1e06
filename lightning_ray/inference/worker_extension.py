"""What vLLM's workers are given beside their own methods: weights that are replaced in full.

vLLM calls these by name, in its worker processes.
"""

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)


class ReplaceWeights:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    def replace_weights(self, folder: str) -> None:
        """Replace the weights by those in a model folder, and all that was made from them.

        The worker's own reload redoes what loading does to a layer's weights, but only for layers
        that a checkpoint names. An output head that shares the embedding's weights is in none: on a
        CPU, which multiplies by a copy packed when the model was first loaded, it would go on
        answering with the first version's (vLLM 0.32; a GPU reads the shared weights).
        """
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        model: torch.nn.Module = self.get_model()  # type: ignore[attr-defined]
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(module, ParallelLMHead) and isinstance(
                method, UnquantizedEmbeddingMethod
            ):
                method.process_weights_after_loading(module)
