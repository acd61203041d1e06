"""The gateway: the one HTTP door, on Ray Serve.

Owns who is calling, which policy answers, and what may pass. It must not know how a policy learns,
and it does not parse or rebuild replies.
"""

from lightning_ray.gateway.config import GatewayConfig, check_gateway
from lightning_ray.gateway.serving import choose_port, start_gateway, stop_gateway

__all__ = ["GatewayConfig", "check_gateway", "choose_port", "start_gateway", "stop_gateway"]
