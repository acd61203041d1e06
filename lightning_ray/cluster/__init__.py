"""The cluster: connecting to Ray, stopping what was started, sending jobs, rendering manifests.

Owns the connection and its environment, Ray's job server, the RayJob, and what is asked of the
machine that a process was placed on. It must not know what runs
on the cluster.
"""

from lightning_ray.cluster.config import ClusterConfig, check_cluster
from lightning_ray.cluster.connection import Connection, Needs
from lightning_ray.cluster.environment import quiet_environment

__all__ = ["ClusterConfig", "Connection", "Needs", "check_cluster", "quiet_environment"]
