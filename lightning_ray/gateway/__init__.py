"""The gateway: the one HTTP door, on Ray Serve.

Owns who is calling, which role is played and so which policy answers, which prompt takes the place
of the agent's own, and what may pass. It must not know how a policy learns, and it does not rebuild
replies.
"""

from lightning_ray.gateway.answerers import Answerer, upstream_answerer
from lightning_ray.gateway.config import (
    GatewayConfig,
    RoleConfig,
    ServingConfig,
    check_gateway,
    check_serving,
)
from lightning_ray.gateway.fleet import Fleet
from lightning_ray.gateway.live import LiveDoor, start_desk
from lightning_ray.gateway.roles import Role, describe, make_roles, models_of
from lightning_ray.gateway.service import Service, champions_of
from lightning_ray.gateway.serving import (
    choose_port,
    door_url,
    gateway_application,
    prepare_gateway,
    start_gateway,
    stop_gateway,
)
from lightning_ray.gateway.system_prompt import asked, system_prompt

__all__ = [
    "Answerer",
    "Fleet",
    "GatewayConfig",
    "LiveDoor",
    "Role",
    "RoleConfig",
    "Service",
    "ServingConfig",
    "asked",
    "champions_of",
    "check_gateway",
    "check_serving",
    "choose_port",
    "describe",
    "door_url",
    "gateway_application",
    "make_roles",
    "models_of",
    "prepare_gateway",
    "start_desk",
    "start_gateway",
    "stop_gateway",
    "system_prompt",
    "upstream_answerer",
]
