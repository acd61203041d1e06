"""Starting and stopping the door on Ray Serve.

Invariant: a job's door is an application of its own. What else Ray Serve runs on the same cluster,
other jobs' doors among it, is left alone.
"""

import logging
import socket
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.config import GatewayConfig
from lightning_ray.gateway.live import LiveDoor
from lightning_ray.gateway.roles import Role
from lightning_ray.spans import SpanClient

log = logging.getLogger(__name__)

HEAD = "node:__internal_head__"
"""A resource that Ray gives the head node, whose address is the door's."""


def choose_port(config: GatewayConfig) -> int:
    """The port to listen on. Raises UserError when the configured one is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"gateway.port={config.port}: cannot listen on {config.host}:{config.port} "
                f"({error.strerror}); choose another port, or 0 for any free one"
            ) from error
        return probe.getsockname()[1]


def gateway_application(
    config: GatewayConfig,
    queue: ActorHandle | None,
    roles: Sequence[Role],
    answerers: Sequence[Answerer],
    spans: SpanClient,
    live: LiveDoor | None = None,
    port: int | None = None,
) -> serve.Application:
    """The door as an application that Ray Serve can run.

    `queue` lets attempts in, `live` callers with keys. With a `port` its replicas listen there
    themselves, on the head node; otherwise calls come through Ray Serve's own proxies.
    """
    # Imported late: the module needs Ray Serve's decorators, which read the environment.
    from lightning_ray.gateway.app import Gateway

    options: dict[str, Any] = {"num_cpus": config.num_cpus}
    if port is not None:
        options["resources"] = {HEAD: 0.001}
    # What the decorator made of the class is a deployment, which type checkers cannot see.
    application: serve.Application = Gateway.options(  # type: ignore[attr-defined]
        num_replicas=config.num_replicas,
        # The door itself refuses what is too much, with a reason; Serve would let it wait.
        max_ongoing_requests=2 * config.max_calls,
        ray_actor_options=options,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    ).bind(config, queue, list(roles), list(answerers), spans, live, port)
    return application


def door_url(config: GatewayConfig, port: int) -> str:
    """The base URL of a door that listens on this port of this node, "http://HOST:PORT"."""
    host = config.host
    if host in ("0.0.0.0", "::"):
        # Listening everywhere is no address to call: say the one that other nodes reach.
        host = ray.util.get_node_ip_address()
    return f"http://{host}:{port}"


def prepare_gateway(job: str) -> None:
    """Does what `start_gateway` needs and takes a while, for it to find: Ray Serve runs, and the
    door is closed that the job had under a driver that was killed.

    Raises InfrastructureError when that is not closed.
    """
    stop_gateway(job)
    _start_serve()


def start_gateway(
    config: GatewayConfig,
    port: int,
    job: str,
    queue: ActorHandle | None,
    roles: Sequence[Role],
    answerers: Sequence[Answerer],
    spans: SpanClient,
    live: LiveDoor | None = None,
) -> str:
    """Starts the door of a job and returns its base URL, "http://HOST:PORT".

    It ends with `stop_gateway`, or by itself once the job's queue, or its desk, is gone for good.
    `queue` lets attempts in, `live` callers with keys.
    """
    _start_serve()
    application = gateway_application(config, queue, roles, answerers, spans, live, port)
    # No route: it does not hear calls through Serve's proxies, which another application may use.
    serve.run(application, name=_application(job), route_prefix=None)
    return door_url(config, port)


def stop_gateway(job: str) -> None:
    """Closes the door of a job, if it is open; calls in flight are cut off.

    Ray Serve goes on, for another job may be about to open its door there: on a cluster of a job's
    own it ends with that. Raises InfrastructureError when it does not close the door.
    """
    try:
        serve.delete(_application(job))
    except RayServeException:
        log.debug("no Ray Serve runs, so no door is open")
    except (TimeoutError, RayError) as error:
        raise InfrastructureError(f"Ray Serve did not close the door: {error}") from error


def _start_serve() -> None:
    # Serve speaks to the terminal by itself; the panel says what there is to say.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="Disabled",
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _application(job: str) -> str:
    return f"lightning-ray-{job}"
