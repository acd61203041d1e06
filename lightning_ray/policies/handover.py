"""A version's weights on their way from the learner that made them to the engines that answer.

There is one interface and there are four ways, and on each the engines check what arrived:

- `disk`: a model folder that every node can read;
- `shared_memory`: a file in the learner's memory (memfd) that engines on its node map: it has no
  name in any file system, takes nothing of /dev/shm, and is gone with the process;
- `gpu_memory`: a copy in the memory of the learner's GPU that engines on the same GPU read there;
- `object_store`: the same bytes through Ray's object store, once for each node.

Of a model with low-rank additions only their factors travel, by way of the disk where they are all
that is published; whoever takes them on adds them to the base model's weights. An engine that can
read neither memory nor object store, for it is on another node than `shared_memory` reaches, or on
another GPU, reads the folder: of a whole model without a checksum.

Whatever the way, the folder is written too, for the registry and for engines that start later; but
for `disk` that goes on while the engines answer already.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_ray.policies.gpu_memory import GpuWeights


_COLUMNS = 16
"""Words of a row: with 2 or with 64 of them a CPU takes about twice as long as with 16."""


class Way(StrEnum):
    """How weights travel."""

    auto = "auto"
    """GPU memory where every engine is on the learner's GPU, shared memory where every one is on
    its node, and else the object store."""
    disk = "disk"
    gpu_memory = "gpu_memory"
    shared_memory = "shared_memory"
    object_store = "object_store"


def shortest_way(node: str, nodes: set[str], gpu: str, gpus: set[str]) -> Way:
    """What `auto` comes to: the learner's node and GPU, and those of the engines that answer.

    "" is no GPU. Where no engine says where it is, one has just died, and may come back anywhere.
    """
    if gpu and gpus == {gpu}:
        return Way.gpu_memory
    return Way.shared_memory if nodes == {node} else Way.object_store


@dataclass(frozen=True)
class Handed:
    """Weights that a learner hands over."""

    folder: str
    """Where the version lies, or will lie once it is written."""
    digest: str
    """`Checksum` of the tensors that travel."""
    nbytes: int
    """Of the tensors that travel."""
    memory: str = ""
    """A safetensors file in memory, to be opened by processes of the node."""
    node: str = ""
    """The node, as Ray calls it."""
    data: tuple[Any, ...] = ()
    """A reference to the same file as uint8[n] in Ray's object store, or none."""
    base: str = ""
    """A model folder; then what travels are `additions` to its weights."""
    scale: float = 0.0
    """What the additions are multiplied by."""
    gpu: "GpuWeights | None" = None
    """The tensors in a GPU's memory."""


class Checksum:
    """Of named tensors, in any order: of each its shape, type and sums over its bytes.

    The sums run at the speed of memory, where a cryptographic hash would take longer than the
    weights' whole way: it tells versions apart and finds damage, and not who means harm.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, tensor: "Tensor") -> None:
        """Takes in one tensor, on any device."""
        import torch

        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        whole = len(flat) // (8 * _COLUMNS) * 8 * _COLUMNS
        # Of every sixteenth word apart, so that neighbours that changed places are found. Sums wrap
        # around. Down the columns of a matrix they need one pass and vector instructions.
        words = flat[:whole].view(torch.int64).view(-1, _COLUMNS)
        sums = [*words.sum(0).tolist(), *flat[whole:].tolist()]
        kind = str(tensor.dtype).removeprefix("torch.")
        shape = "x".join(map(str, tensor.shape))
        self._lines.append(f"{name} {kind} {shape} {' '.join(map(str, sums))}")

    def through(self, tensors: Iterable[tuple[str, "Tensor"]]) -> Iterator[tuple[str, "Tensor"]]:
        """The same tensors, each taken in on its way."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()
