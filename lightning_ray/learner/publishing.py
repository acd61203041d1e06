"""Weights on their way out of the learner: gathered from all ranks, written as a model folder."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_ray.errors import UserError
from lightning_ray.learner.config import LoraConfig
from lightning_ray.learner.folders import commit_folder, copy_companions, partial_folder
from lightning_ray.learner.lora import (
    merged_weights,
    scale_of,
    sent_names,
    write_adapter,
)
from lightning_ray.learner.outgoing import (
    WEIGHTS,
    Additions,
    Outgoing,
    checkpoint_tensors,
    type_name,
)
from lightning_ray.policies.additions import weight_of
from lightning_ray.policies.handover import Handed, Way


class Publisher:
    """One rank's part in publishing; every rank calls the same methods at the same time."""

    def __init__(
        self, model: Any, dtype: torch.dtype, rank: int, base: Path, lora: LoraConfig
    ) -> None:
        """`model` is what learns, `base` the folder it was loaded from.

        Raises UserError when an adapter is to be published to which `base` has no weights.
        """
        self._model = model
        self._dtype = dtype
        self._first = rank == 0
        self._base = base
        self._lora = lora
        self._adapter = bool(lora.rank) and lora.publish == "adapter"
        self._outgoing = Outgoing(base, dtype)
        if self._adapter and not self._travelling(model.state_dict()):
            raise UserError(
                "learner.lora.publish=adapter: the files of this model name its weights otherwise "
                "than the learner does, so that engines could not add to them; use merged"
            )

    def publish(self, target: Path) -> None:
        """Writes a model folder, or that of an adapter; it is there afterwards."""
        weights = whole_weights(self._model, self._dtype, self._first)
        if self._first:
            partial = partial_folder(target)
            write_model(partial, self._model, weights, self._base, self._lora)
            commit_folder(partial, target)
        torch.distributed.barrier()

    def hand_over(self, target: Path, way: Way) -> Handed | None:
        """Hands the model over; see `Outgoing.hand_over`. None but on the first rank.

        Where it has low-rank additions, only their factors travel; by way of the disk where they
        are what is published.
        """
        stays = way is Way.gpu_memory
        # Where nothing is computed with them first, they change their type as they are written.
        convert = stays or bool(self._lora.rank)
        weights = whole_weights(
            self._model, self._dtype, self._first, copy=False, on_cpu=not stays, convert=convert
        )
        handed = None
        if self._first:
            small = way is not Way.disk or self._adapter
            if small and (names := self._travelling(weights)):
                sent = {name: weights[here] for here, name in names.items()}
                write = self._write_adapter
                if not self._adapter:
                    # What is not sent is not trained: it is the same when that thread comes to it.
                    write = functools.partial(self._write_whole, weights, names)
                additions = Additions(scale_of(self._lora), write)
                handed = self._outgoing.hand_over(target, sent, way, additions)
            else:
                handed = self._outgoing.hand_over(target, self._whole(weights, {}, {}), way)
        torch.distributed.barrier()
        return handed

    def _write_adapter(self, folder: Path, sent: dict[str, Tensor]) -> None:
        write_adapter(folder, sent, self._base, self._lora, self._model)

    def _write_whole(
        self,
        weights: dict[str, Tensor],
        names: dict[str, str],
        folder: Path,
        sent: dict[str, Tensor],
    ) -> None:
        whole = self._whole(weights, names, sent)
        save_file(whole, folder / WEIGHTS, {"format": "pt"})
        copy_companions(self._base, folder, type_name(self._dtype))

    def _whole(
        self, weights: dict[str, Tensor], names: dict[str, str], sent: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """All tensors of a checkpoint, with the factors as they were sent."""
        weights = weights | {here: sent[name] for here, name in names.items()}
        if self._lora.rank:
            # Where there is room for another model, which a GPU may not have.
            weights = merged_weights(_on_cpu(weights), self._lora)
        return checkpoint_tensors(self._model, weights)

    def _travelling(self, weights: Iterable[str]) -> dict[str, str]:
        """How the factors are called on their way, by their names here.

        Empty where they cannot travel by themselves: without additions, and where the base's own
        files have another name for what they belong to.
        """
        names = sent_names(weights)
        return names if all(weight_of(name) in self._in_base for name in names.values()) else {}

    @functools.cached_property
    def _in_base(self) -> frozenset[str]:
        """What the base's own files call its weights; nothing where vLLM reads others of them."""
        names: set[str] = set()
        if any(self._base.glob("consolidated*.safetensors")):
            return frozenset()
        for file in sorted(self._base.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        return frozenset(names)

    def taken(self) -> None:
        """Every engine has what was handed over; see `Outgoing.taken`."""
        self._outgoing.taken()

    def settle(self, timeout_s: float) -> None:
        """Waits until what was handed over lies on disk; see `Outgoing.settle`."""
        self._outgoing.settle(timeout_s)


def _on_cpu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors there; what had two names is one tensor still."""
    moved: dict[int, Tensor] = {}
    for value in weights.values():
        if id(value) not in moved:
            moved[id(value)] = value.cpu()
    return {name: moved[id(value)] for name, value in weights.items()}


def whole_weights(
    model: nn.Module,
    dtype: torch.dtype,
    wanted: bool,
    copy: bool = True,
    on_cpu: bool = True,
    convert: bool = True,
) -> dict[str, Tensor]:
    """Every weight on this rank's CPU, or where it is whole, by name; nothing if not `wanted`.

    Without `copy` they are the model's own where they can be, and change with it; without `convert`
    those keep their type. All ranks call it at the same time: with ZeRO 3 each has a part of every
    weight.
    """
    weights: dict[str, Tensor] = {}
    copied: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        # One at a time: the whole model need not fit beside what a rank has.
        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            if wanted:
                own = copy or hasattr(value, "ds_id")
                # What has two names, as a head that is the embedding, is one tensor here too.
                if id(value) not in copied:
                    # On a GPU there need not be room for the whole model.
                    device = torch.device("cpu") if on_cpu or own else value.device
                    # What has to move is made small first.
                    stays = not own and value.device == device
                    kind = value.dtype if stays and not convert else dtype
                    copied[id(value)] = value.detach().to(device, kind, copy=own)
                weights[name] = copied[id(value)]
    return weights


def write_model(
    folder: Path, model: nn.Module, weights: dict[str, Tensor], base: Path, lora: LoraConfig
) -> None:
    """Writes weights as a Hugging Face folder: a whole model, or a LoRA adapter alone.

    Args:
        model: what the weights are of, a transformers model, maybe with additions.
        weights: by name, all of one type.
        base: the folder that the model was loaded from.
        lora: says whether there are additions, and in which form they are published.
    """
    dtype = next(iter(weights.values())).dtype
    if lora.rank:
        if lora.publish == "adapter":
            sent = {name: weights[here] for here, name in sent_names(weights).items()}
            write_adapter(folder, sent, base, lora, model)
            return
        weights = merged_weights(weights, lora)
    model.save_pretrained(folder, state_dict=weights)
    copy_companions(base, folder, type_name(dtype))
