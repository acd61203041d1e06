"""Configuration of the cluster (Hydra group `cluster`)."""

from dataclasses import dataclass

from lightning_ray.errors import UserError


@dataclass
class ClusterConfig:
    """Which Ray cluster a job runs on."""

    address: str = "local"
    """"local" starts one for this job alone; otherwise the address of a running cluster, or
    "auto" for the one that this machine belongs to."""
    num_cpus: int | None = None
    """Processors that a local cluster believes it has; null counts the machine's, at least 2."""
    object_store_mib: int = 512
    """Shared memory of a local cluster's object store, MiB."""
    log_to_driver: bool = False
    """Print what the actors print; useful when something will not start."""
    stop_timeout_s: float = 10.0
    """Longest that stopping may take before what is left is killed, seconds."""


def check_cluster(config: ClusterConfig) -> None:
    """Raises UserError for values that no cluster can start with."""
    if config.num_cpus is not None and config.num_cpus < 2:
        raise UserError(f"cluster.num_cpus={config.num_cpus}: at least 2 are needed")
    if config.object_store_mib < 100:
        raise UserError(f"cluster.object_store_mib={config.object_store_mib}: at least 100")
