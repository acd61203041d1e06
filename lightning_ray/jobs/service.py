"""The application that a Ray Serve configuration, or a RayService on Kubernetes, names.

    import_path: lightning_ray.jobs.service:build
    args: {settings: [experiment=calculator, "+serving.keys.web=WEB_API_KEY", ...]}

`settings` are those of `lightning-ray serve`. What stands behind the door lives in an actor of its
own, which outlives the task that builds the application; a new build of the same name finds it.
"""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.serve import Application

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.gateway import LiveDoor, gateway_application
from lightning_ray.jobs.serve import prepare, service_of, track
from lightning_ray.spans import SpanClient
from lightning_ray.training import RunFolder

log = logging.getLogger(__name__)

KEEPER = "lightning-ray-service"
START_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class _Opened:
    live: LiveDoor
    store: SpanClient


class Keeper:
    """The actor that holds the service, and follows the releases in a thread of its own."""

    def __init__(self, settings: list[str]):
        self._prepared = prepare(settings)
        self._settings = settings
        self._opened: _Opened | None = None

    def open(self) -> _Opened:
        """Starts the service, once; returns what the door needs."""
        if self._opened is None:
            config = self._prepared.config
            name = f"serve-{config.name}"
            folder = RunFolder.create(Path(config.output_dir), name, self._settings)
            track(config, folder)
            service = service_of(self._prepared, log.warning)
            live = service.start(folder.run_id, folder.spans, config.spans, self._prepared.keys)
            threading.Thread(target=service.follow, name="follow-releases", daemon=True).start()
            self._opened = _Opened(live, service.store)
        return self._opened


def build(args: dict[str, Any]) -> Application:
    """The door and, behind it, the service. Raises UserError for settings that cannot be served."""
    settings = list(args.get("settings") or [])
    prepared = prepare(settings)
    keeper = (
        ray.remote(Keeper)
        .options(
            name=KEEPER,
            namespace="lightning-ray",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
        )
        .remote(settings)
    )
    try:
        opened: _Opened = ray.get(keeper.open.remote(), timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        raise InfrastructureError(
            f"the service's engines did not start in {START_TIMEOUT_S:g} s"
        ) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise InfrastructureError(f"the service did not start: {error.cause}") from error
    return gateway_application(
        prepared.config.gateway, None, prepared.roles, [], opened.store, opened.live
    )
