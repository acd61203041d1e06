"""Weights in a GPU's memory that another process on that GPU reads where they are (CUDA IPC).

What is shared is one piece of memory of its own, taken from the driver and not from PyTorch: a
handle to a part of PyTorch's pool would name all of the pool around it, and PyTorch's own sharing
counts readers, of which there may be any number here.

The driver's functions: https://docs.nvidia.com/cuda/cuda-driver-api, section "Memory Management".
"""

import ctypes
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import InfrastructureError
from lightning_ray.policies.handover import Checksum

if TYPE_CHECKING:
    from torch import Tensor

HANDLE_BYTES = 64
ALIGNMENT = 256
"""Every tensor begins at a multiple of so many bytes, as PyTorch's own do."""
_LAZY_PEER_ACCESS = 1


@dataclass(frozen=True)
class GpuWeights:
    """Tensors in a GPU's memory, as another process of the node finds them."""

    gpu: str
    """The GPU's UUID, which is the same whatever GPUs a process is shown."""
    handle: bytes
    """The driver's handle of the memory."""
    nbytes: int
    """Of the memory."""
    layout: list[tuple[str, str, list[int], int]]
    """Of every tensor: name, type (as PyTorch calls it), shape, and where it begins, bytes."""
    place: str = ""
    """Node and GPUs of the process that shares them, see `place`."""


def place() -> str:
    """Node and GPUs that Ray gave this process; "" without a GPU.

    Two processes of one place see the same GPU first.
    """
    import ray

    if not ray.is_initialized() or not (gpus := ray.get_gpu_ids()):
        return ""
    return f"{ray.get_runtime_context().get_node_id()}/{','.join(map(str, gpus))}"


class GpuMemory:
    """Memory of the present GPU that is written by this process and read by others."""

    def __init__(self) -> None:
        self._address = 0
        self._handle = b""
        self._flat: Tensor | None = None
        self.tensors: dict[str, Tensor] = {}
        """What is in it; they change with the next `write`."""

    def write(self, tensors: Mapping[str, "Tensor"]) -> tuple[str, GpuWeights]:
        """Replaces what is there; returns the `Checksum` of the tensors, and where they are.

        Raises InfrastructureError when the GPU has no room, or cannot share its memory.
        """
        import torch

        layout: list[tuple[str, str, list[int], int]] = []
        end = 0
        for name, tensor in tensors.items():
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + tensor.numel() * tensor.element_size()
            kind = str(tensor.dtype).removeprefix("torch.")
            layout.append((name, kind, list(tensor.shape), begin))
        self._resize(end)
        assert self._flat is not None
        self.tensors = dict(_views(self._flat, layout))
        checksum = Checksum()
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
            checksum.add(name, self.tensors[name])
        torch.cuda.synchronize()
        return checksum.hexdigest(), GpuWeights(_uuid(), self._handle, end, layout, place())

    def _resize(self, nbytes: int) -> None:
        import torch

        if self._flat is not None and len(self._flat) == nbytes:
            return
        self.free()
        address = ctypes.c_uint64()
        wanted = ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1))
        try:
            _call("cuMemAlloc_v2", *wanted)
        except InfrastructureError:
            # What PyTorch keeps for later is taken as far as the driver knows.
            torch.cuda.empty_cache()
            _call("cuMemAlloc_v2", *wanted)
        self._address = address.value
        handle = _Handle()
        try:
            _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        except InfrastructureError:
            self.free()
            raise
        self._handle = bytes(handle.bytes)
        self._flat = _as_tensor(self._address, nbytes)

    def free(self) -> None:
        """Gives the memory back; what reads it then fails."""
        self.tensors = {}
        self._flat = None
        if self._address:
            _call("cuMemFree_v2", ctypes.c_uint64(self._address))
            self._address = 0


@contextmanager
def opened(weights: GpuWeights) -> Iterator[Iterator[tuple[str, "Tensor"]]]:
    """The tensors of another process, by name, to be read within the context and not after it.

    Raises InfrastructureError when this process does not see the GPU that they are on, or the
    process that shares them is gone.
    """
    import torch

    with torch.cuda.device(_device_of(weights.gpu)):
        address = ctypes.c_uint64()
        handle = _Handle((ctypes.c_ubyte * HANDLE_BYTES).from_buffer_copy(weights.handle))
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, flags)
        try:
            yield _views(_as_tensor(address.value, weights.nbytes), weights.layout)
        finally:
            torch.cuda.synchronize()
            _call("cuIpcCloseMemHandle", address)


def _views(
    flat: "Tensor", layout: list[tuple[str, str, list[int], int]]
) -> Iterator[tuple[str, "Tensor"]]:
    import torch

    for name, kind, shape, begin in layout:
        dtype = getattr(torch, kind)
        count = torch.Size(shape).numel()
        end = begin + count * dtype.itemsize
        yield name, flat[begin:end].view(dtype).view(shape)


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * HANDLE_BYTES)]


class _Raw:
    """Memory that PyTorch takes as a tensor, without owning it."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _as_tensor(address: int, nbytes: int) -> "Tensor":
    import torch

    found: Tensor = torch.as_tensor(_Raw(address, nbytes), device="cuda")
    return found


def _uuid(device: int | None = None) -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _device_of(gpu: str) -> int:
    import torch

    for device in range(torch.cuda.device_count()):
        if _uuid(device) == gpu:
            return device
    raise InfrastructureError(
        f"the weights are in the memory of GPU {gpu}, which this process does not see; "
        "set training.weights=shared_memory"
    )


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(function: str, *arguments: Any) -> None:
    """Calls the driver. PyTorch must have used the GPU in this thread, which makes it current."""
    import torch

    torch.cuda.current_stream().synchronize()
    code = getattr(_driver(), function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        said = text.value.decode() if text.value else f"error {code}"
        raise InfrastructureError(f"the GPU's driver refused {function}: {said}")
