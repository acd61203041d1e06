"""The real door on Ray Serve, with its queue and its store, for tests that come with HTTP."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import ray

from lightning_ray.gateway import (
    Answerer,
    GatewayConfig,
    LiveDoor,
    Role,
    ServingConfig,
    choose_port,
    make_roles,
    start_desk,
    start_gateway,
    stop_gateway,
)
from lightning_ray.gateway.desk import digest_of
from lightning_ray.rollouts import QueueClient, RolloutsConfig, RolloutSpec, start_queue
from lightning_ray.rollouts.types import Lease
from lightning_ray.spans import SpanClient, SpansConfig, start_store

NOBODY = "http://127.0.0.1:9"
"""An address where nobody answers."""


@dataclass
class OpenDoor:
    """The gateway, its queue and its store."""

    url: str
    queue: QueueClient
    store: SpanClient
    _attempts: int = 0

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def lease(self, rollout_id: str = "") -> Lease:
        """A running attempt, of a new rollout."""
        self._attempts += 1
        self.queue.enqueue([RolloutSpec(rollout_id or f"r{self._attempts}", "task", {}, 600.0)])
        lease: Lease = ray.get(self.queue.actor.dequeue.remote(5), timeout=10)
        return lease


@contextmanager
def open_door(
    folder: Path,
    config: GatewayConfig,
    answerers: Sequence[Answerer] = (Answerer("policy", (NOBODY,), "key"),),
    roles: Sequence[Role] | None = None,
    rollouts: RolloutsConfig | None = None,
    keys: Mapping[str, str] | None = None,
    serving: ServingConfig | None = None,
    job: str = "run",
) -> Iterator[OpenDoor]:
    """A door for as long as it lasts; `keys` open it for live traffic, by caller.

    Without `roles`, every model name of the configuration is the policy's, called "policy".
    """
    queue = start_queue("run", rollouts or RolloutsConfig(), folder / "rollouts")
    store = start_store(str(folder / "spans"), SpansConfig())
    live = desk = None
    if keys is not None:
        desk = start_desk("run", {name: digest_of(key) for name, key in keys.items()}, 60.0)
        live = LiveDoor(desk.actor, serving or ServingConfig(), "run")
    url = start_gateway(
        config,
        choose_port(config),
        job,
        queue.actor,
        roles or make_roles(config, "policy", ["policy"]),
        answerers,
        store,
        live,
    )
    try:
        yield OpenDoor(url, queue, store)
    finally:
        stop_gateway(job)
        store.close()
        ray.kill(queue.actor)
        if desk is not None:
            ray.kill(desk.actor)
