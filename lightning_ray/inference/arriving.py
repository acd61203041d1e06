"""Weights on their way into an engine: a file that vLLM's workers, other processes, can open."""

import os
from typing import Any

import ray

from lightning_ray.errors import InfrastructureError
from lightning_ray.policies.handover import Handed

FETCH_TIMEOUT_S = 300.0


class Arriving:
    """Where the weights of the next version can be read on this node.

    What came through Ray's object store lies in memory of this process, under a name that its
    children can open, until the next version comes.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def file(self, handed: Handed, *, by_store: bool = False) -> str:
        """The safetensors file of the weights; "" where they are to be read from their folder.

        `by_store` says not to look into the learner's memory, even on its node. Blocks while the
        weights come. Raises InfrastructureError when they do not.
        """
        # A process of another node may have the same number.
        here = handed.node == str(ray.get_runtime_context().get_node_id())
        if handed.memory and here and not by_store:
            return handed.memory
        if not handed.data:
            return ""
        try:
            data: Any = ray.get(handed.data[0], timeout=FETCH_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise InfrastructureError(
                f"the weights of {handed.folder} did not come through the object store: {error}"
            ) from error
        if self._file is None:
            self._file = os.memfd_create("lightning-ray-arrived", os.MFD_CLOEXEC)
        if os.fstat(self._file).st_size != len(data):
            os.ftruncate(self._file, len(data))
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, memoryview(data)[done:], done)
        return f"/proc/{os.getpid()}/fd/{self._file}"
