"""Where batches are built: an actor, so that no step waits for a process to start.

A task would do the same work; but Ray ends a process that had nothing to do for a second, and a new
one takes two seconds to import what building a batch needs: as long as the weights take.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_ray.training.batches import make_batch, oldest_versions

TRIES = 2
"""How often a batch is built again whose actor died meanwhile: it has no state of its own."""


class BatchMaker:
    """The actor's class."""

    def make(self, *arguments: Any) -> Any:
        """What `make_batch` returns, as two objects: the sequences, and what is known of them."""
        return make_batch(*arguments)

    def oldest(self, *arguments: Any) -> dict[str, dict[str, int]]:
        """What `oldest_versions` returns."""
        return oldest_versions(*arguments)


def start_batch_maker() -> "ray.actor.ActorHandle":
    """An actor of `BatchMaker`; it is gone with the job."""
    # Where the job was started: of other nodes any may come and go. Not softly: for an actor that
    # needs no processor Ray takes that for leave to place it anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(BatchMaker).options(
        num_cpus=0, max_restarts=-1, max_task_retries=TRIES, scheduling_strategy=here
    )
    return actor.remote()
