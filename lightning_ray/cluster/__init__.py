"""The cluster: connecting to Ray, and stopping what was started.

Owns the connection and its environment. It must not know what runs on the cluster.
"""

from lightning_ray.cluster.config import ClusterConfig, check_cluster
from lightning_ray.cluster.connection import Connection, Needs
from lightning_ray.cluster.environment import quiet_environment

__all__ = ["ClusterConfig", "Connection", "Needs", "check_cluster", "quiet_environment"]
