"""What vLLM's workers are given beside their own methods: weights that are replaced in full.

vLLM calls these by name, in its worker processes.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader import get_model_loader

from lightning_ray.errors import InfrastructureError
from lightning_ray.inference import heads
from lightning_ray.policies.adapters import read_adapter
from lightning_ray.policies.additions import with_additions
from lightning_ray.policies.gpu_memory import GpuWeights, opened
from lightning_ray.policies.handover import Checksum

log = logging.getLogger(__name__)

FOLDER_S = 60.0
"""How long a folder that is being written is waited for while calls stand still."""


class ReplaceWeights:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    def replace_weights(
        self,
        folder: str,
        file: str = "",
        digest: str = "",
        base: str = "",
        scale: float = 0.0,
        gpu: Sequence[Any] = (),
    ) -> None:
        """Replace the weights by those in a version's folder, and all that was made from them.

        It holds a whole model or an adapter. `file` holds the same weights in memory, where there
        is one: then that is read; and `gpu`, the fields of a `GpuWeights`, in a GPU's memory. With
        a `base` either holds additions to the weights of that folder, to be multiplied by `scale`.
        `digest` is the `Checksum` that what is read must have, if it is known. Raises
        InfrastructureError when it has another.

        The worker's own reload redoes what loading does to a layer's weights, but only for layers
        that a checkpoint names. An output head that shares the embedding's weights is in none: on a
        CPU, which multiplies by a copy packed when the model was first loaded, it would go on
        answering with the first version's (vLLM 0.32; a GPU reads the shared weights).
        """
        if gpu:
            with ExitStack() as stack:
                try:
                    weights = stack.enter_context(opened(GpuWeights(*gpu)))
                except InfrastructureError as error:
                    log.warning("%s; reading %s, once it is written", error, folder)
                else:
                    self._replace(weights, folder, digest, base, scale)
                    return
            _wait_for(folder)
        elif file:
            self._replace(_of_file(file), folder, digest, base, scale)
            return
        adapter = read_adapter(Path(folder))
        if adapter is not None:
            base, scale = str(adapter.base), adapter.scale
            self._replace(adapter.additions(), folder, digest, base, scale)
        else:
            # Of additions a whole model has no checksum.
            self._replace(self._of_folder(folder), folder, "" if base else digest, "", 0.0)

    def _replace(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        folder: str,
        digest: str,
        base: str,
        scale: float,
    ) -> None:
        checksum = Checksum()
        if digest:
            weights = checksum.through(weights)
        if base:
            device = next(self.get_model().parameters()).device  # type: ignore[attr-defined]
            additions = {name: tensor.to(device) for name, tensor in weights}
            weights = with_additions(self._of_folder(base), additions, scale)
        heads.forget()
        self.reload_weights(weights_iterator=weights)  # type: ignore[attr-defined]
        if digest and (found := checksum.hexdigest()) != digest:
            raise InfrastructureError(
                f"the weights of {folder} did not arrive as they were sent: their checksum is "
                f"{found[:12]} and not {digest[:12]}"
            )
        settings: Any = self.vllm_config.model_config  # type: ignore[attr-defined]
        if settings.head_dtype != settings.dtype:
            # Then what was packed of the head is not what it is computed with; see `heads`.
            return
        model: torch.nn.Module = self.get_model()  # type: ignore[attr-defined]
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(module, ParallelLMHead) and isinstance(
                method, UnquantizedEmbeddingMethod
            ):
                method.process_weights_after_loading(module)

    def _of_folder(self, folder: str) -> Iterable[tuple[str, torch.Tensor]]:
        """The weights of a model folder, as vLLM's own loader reads them."""
        settings: Any = self.vllm_config  # type: ignore[attr-defined]
        settings.model_config.model = folder
        loader: Any = get_model_loader(settings.load_config)
        found: Iterable[tuple[str, torch.Tensor]] = loader.get_all_weights(
            settings.model_config,
            self.get_model(),  # type: ignore[attr-defined]
        )
        return found


def _wait_for(folder: str) -> None:
    deadline = time.monotonic() + FOLDER_S
    while not Path(folder).is_dir():
        if time.monotonic() > deadline:
            raise InfrastructureError(f"{folder} was not written within {FOLDER_S:g} s")
        time.sleep(0.1)


def _of_file(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no dict)
            yield name, opened.get_tensor(name)
