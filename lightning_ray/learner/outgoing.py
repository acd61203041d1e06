"""Weights on their way out of the learner's first rank: into memory for the engines, and to disk.

Invariant: a version's folder appears whole or not at all. The memory is written anew only after
the version in it lies on disk, so that what engines read does not change under them.
"""

import json
import logging
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ray.errors import InfrastructureError
from lightning_ray.learner.folders import commit_folder, copy_companions, partial_folder
from lightning_ray.policies.gpu_memory import GpuMemory
from lightning_ray.policies.handover import Checksum, Handed, Way

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
# The names of the types in a safetensors file.
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_COPY_BYTES = 1 << 26
UNDISTURBED_S = 2.0
"""How long engines load a version before it is written to disk beside them, where nobody says that
they are done: one that starts meanwhile waits for the folder."""


class MemoryFile:
    """A safetensors file in memory of this process; others of this node open it by `path`."""

    def __init__(self) -> None:
        self._file = os.memfd_create("lightning-ray-weights", os.MFD_CLOEXEC)
        self._map: mmap.mmap | None = None
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.nbytes = 0
        """Length of the file."""
        self.tensors: dict[str, Tensor] = {}
        """What is in it; they change with the next `write`."""

    def write(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
        """Replaces what is there, all in `dtype` if one is given; returns the `Checksum` of it.

        The format: https://huggingface.co/docs/safetensors, section "Format".
        """
        types = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
        # By falling size of the type, so that every tensor begins where its type may.
        ordered = sorted(tensors.items(), key=lambda item: (-types[item[0]].itemsize, item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in ordered:
            begin, end = end, end + tensor.numel() * types[name].itemsize
            header[name] = {
                "dtype": _TYPES[types[name]],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.tensors = {}
        self._resize(8 + len(text) + end)
        assert self._map is not None
        self._map[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
        checksum = Checksum()
        for name, tensor in ordered:
            if not tensor.numel():
                self.tensors[name] = tensor.to(types[name])
                checksum.add(name, self.tensors[name])
                continue
            place = 8 + len(text) + header[name]["data_offsets"][0]
            there = torch.frombuffer(
                self._map, dtype=types[name], count=tensor.numel(), offset=place
            ).view(tensor.shape)
            there.copy_(tensor)
            # While a core's cache has it still.
            checksum.add(name, there)
            self.tensors[name] = there
        return checksum.hexdigest()

    def bytes(self) -> Tensor:
        """The file, uint8[nbytes]; changes with the next `write`."""
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def copy_to(self, path: Path) -> None:
        """Writes the file to disk; does not make sure that it is there."""
        with path.open("wb") as file:
            done = 0
            while done < self.nbytes:
                # Inside the kernel, so that a step that computes meanwhile is not held up.
                done += os.sendfile(file.fileno(), self._file, done, _COPY_BYTES)

    def _resize(self, nbytes: int) -> None:
        if nbytes == self.nbytes:
            # Its pages are there already, which is half the time of writing them.
            return
        self._map = None
        os.ftruncate(self._file, nbytes)
        self._map = mmap.mmap(self._file, nbytes)
        self.nbytes = nbytes


def checkpoint_tensors(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the model's own checkpoints name and shape them; each once.

    What transformers does when it saves a model, without the saving.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: value for name, value in weights.items() if name not in ignored}
    kept = remove_tied_weights_from_state_dict(kept, model)
    found: dict[str, Tensor] = revert_weight_conversion(model, kept)
    return found


def type_name(dtype: torch.dtype) -> str:
    """What a model's configuration calls a type."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Additions:
    """What is handed over is added to the base model's weights by whoever takes it on."""

    scale: float
    """What it is multiplied by."""
    write: Callable[[Path, dict[str, Tensor]], None]
    """Writes a version's files into a folder, of what was sent."""


class Outgoing:
    """Hands versions over, one after the other."""

    def __init__(self, base: Path, dtype: torch.dtype):
        """`base` is the folder of the model that the weights are of, `dtype` how they travel."""
        self._base = base
        self._dtype = dtype
        self._memory: MemoryFile | None = None
        self._gpu = GpuMemory()
        self._gpu_wanted: set[str] = set()
        self._gpu_lock = threading.Lock()
        self._writing: threading.Thread | None = None
        self._may_write = threading.Event()
        self._failed: Exception | None = None
        self._target = Path()

    def hand_over(
        self,
        target: Path,
        tensors: dict[str, Tensor],
        way: Way,
        additions: Additions | None = None,
    ) -> Handed:
        """Hands over the tensors of a checkpoint as the version of the folder `target`.

        On another way than `disk` the folder is there only after `settle`, which must have been
        called for the version before. With `additions` the tensors are such, and what these write
        lies on disk.
        """
        nbytes = sum(tensor.numel() for tensor in tensors.values()) * self._dtype.itemsize
        # There from the beginning: the number is taken, whatever happens now.
        partial = partial_folder(target)
        if self._memory is None:
            self._memory = MemoryFile()
        memory = self._memory
        self._target = target
        self._may_write.clear()
        base, scale = (str(self._base), additions.scale) if additions else ("", 0.0)
        if way is Way.gpu_memory:
            try:
                digest, there = self._gpu.write(
                    {name: tensor.to(self._dtype) for name, tensor in tensors.items()}
                )
            except InfrastructureError as error:
                log.warning("%s; the weights go by shared memory", error)
                way = Way.shared_memory
            else:
                self._gpu_wanted = {"reader", "writer"}
                # The GPU's memory is wanted back.
                self._may_write.set()
                self._write_beside(memory, partial, additions, digest)
                return Handed(str(target), digest, nbytes, "", _node(), (), base, scale, there)
        digest = memory.write(tensors, self._dtype)
        if way is Way.disk:
            self._write(memory, partial, additions)
            return Handed(str(target), digest, nbytes)
        self._write_beside(memory, partial, additions)
        data: tuple[Any, ...] = ()
        if way is Way.object_store:
            import ray

            data = (ray.put(memory.bytes().numpy()),)
        return Handed(str(target), digest, nbytes, memory.path, _node(), data, base, scale)

    def settle(self, timeout_s: float) -> None:
        """Waits until the version that was handed over lies on disk.

        Raises InfrastructureError when that fails or takes longer.
        """
        if self._writing is not None:
            self._may_write.set()
            self._writing.join(timeout_s)
            if self._writing.is_alive():
                raise InfrastructureError(f"{self._target} was not written within {timeout_s:g} s")
            self._writing = None
            if not self._target.is_dir() and self._failed is None:
                self._failed = FileNotFoundError("its folder is not there")
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise InfrastructureError(f"{self._target} could not be written: {failed}") from failed

    def taken(self) -> None:
        """Every engine has the version that was handed over.

        A GPU's memory is no longer needed, and writing to disk disturbs nobody.
        """
        self._may_write.set()
        self._free("reader")

    def _free(self, by: str) -> None:
        """Gives a GPU's memory back once both who reads and who writes it to disk are done."""
        with self._gpu_lock:
            if by in self._gpu_wanted:
                self._gpu_wanted.remove(by)
                if not self._gpu_wanted:
                    self._gpu.free()

    def _write_beside(self, *what: Any) -> None:
        self._writing = threading.Thread(target=self._write_quietly, args=what, daemon=True)
        self._writing.start()

    def _write(
        self,
        memory: MemoryFile,
        partial: Path,
        additions: Additions | None,
        in_gpu: str = "",
    ) -> None:
        """Writes what is in memory to disk; what a GPU has, of digest `in_gpu`, by way of it."""
        if in_gpu:
            # Beside what the learner computes, and not between it.
            with torch.cuda.stream(torch.cuda.Stream()):
                found = memory.write(self._gpu.tensors)
            self._free("writer")
            if found != in_gpu:
                raise InfrastructureError("what came from the GPU is not what was handed over")
        if additions is None:
            memory.copy_to(partial / WEIGHTS)
            copy_companions(self._base, partial, type_name(self._dtype))
        else:
            additions.write(partial, memory.tensors)
        commit_folder(partial, self._target)

    def _write_quietly(self, *what: Any) -> None:
        # Two cores, or the way to memory, are soon taken: calls wait while engines load.
        self._may_write.wait(UNDISTURBED_S)
        try:
            self._write(*what)
        except Exception as error:  # noqa: BLE001 (told to who settles)
            self._failed = error


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
