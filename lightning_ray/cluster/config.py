"""Configuration of the cluster (Hydra group `cluster`): where a job runs, and how it gets there."""

import re
from dataclasses import dataclass, field

from lightning_ray.errors import UserError

KUBERAY = "kuberay"
"""The address that stands for Kubernetes: a job for it is rendered, not sent."""

EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "/outputs",
    "/multirun",
    "__pycache__",
    "*.egg-info",
    "node_modules",
    ".env",
    ".*_cache",
    ".hypothesis",
)

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class GroupConfig:
    """The pods of one worker group on Kubernetes."""

    replicas: int = 1
    """Pods of the group."""
    cpus: int = 4
    """Processors of a pod."""
    memory: str = "16Gi"
    """Memory of a pod, a Kubernetes quantity."""
    gpus: int = 0
    """GPUs of a pod (`nvidia.com/gpu`)."""


@dataclass
class ClusterConfig:
    """Which Ray cluster a job runs on, and what a submitted job takes along."""

    address: str = "local"
    """"local" starts one for this job alone; otherwise the address of a running cluster, or
    "auto" for the one that this machine belongs to. `lightning-ray submit` takes the address of a
    job server, http://HOST:8265; "kuberay" renders a manifest in place of sending anything."""
    num_cpus: int | None = None
    """Processors that a local cluster believes it has; null counts the machine's, at least 2."""
    object_store_mib: int = 512
    """Shared memory of a local cluster's object store, MiB."""
    log_to_driver: bool = False
    """Print what the actors print; useful when something will not start."""
    stop_timeout_s: float = 10.0
    """Longest that stopping may take before what is left is killed, seconds."""

    # What follows is read by `lightning-ray submit` alone.
    job: str | None = None
    """Id of the submitted job; null makes one up. No two jobs of a cluster have the same."""
    program: str = "lightning-ray"
    """How our command is called on the cluster's head; a path where it is not on PATH there."""
    working_dir: str = "."
    """Folder that a job takes along and runs in, or a URI of one that Ray can fetch."""
    excludes: list[str] = field(default_factory=lambda: list(EXCLUDES))
    """What of it stays behind, as in a .gitignore; what its .gitignore names does too."""
    max_upload_mib: int = 100
    """Largest package that is sent, MiB."""
    env_vars: list[str] = field(default_factory=list)
    """Names of variables that the job gets; their values come from where `submit` is typed."""
    settings: list[str] = field(default_factory=list)
    """Settings that every submitted job gets before those that are typed."""
    job_stop_timeout_s: float = 60.0
    """Longest that a job may take to stop by itself before it is killed, seconds."""

    # On Kubernetes.
    manifest: str | None = None
    """File that the manifest is written to; null prints it."""
    image: str = "lightning-ray:0.1.0"
    """Image of every pod; this package and its environment are in it."""
    namespace: str = "lightning-ray"
    """Namespace of everything."""
    pvc: str = "lightning-ray"
    """PersistentVolumeClaim that every pod mounts at /data; ReadWriteMany on several nodes."""
    secret: str = "lightning-ray"
    """Secret that holds the variables of `env_vars`, under their names."""
    head: GroupConfig = field(default_factory=lambda: GroupConfig(cpus=2, memory="8Gi"))
    """The head's pod: driver, gateway, span store."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Worker groups by role: rollouts, inference, learner."""


def check_cluster(config: ClusterConfig) -> None:
    """Raises UserError for values that no job can run with."""
    if config.num_cpus is not None and config.num_cpus < 2:
        raise UserError(f"cluster.num_cpus={config.num_cpus}: at least 2 are needed")
    if config.object_store_mib < 100:
        raise UserError(f"cluster.object_store_mib={config.object_store_mib}: at least 100")
    if config.address == KUBERAY or "://" in config.address.removeprefix("ray://"):
        raise UserError(
            f"cluster.address={config.address}: a job is sent there with "
            "`lightning-ray submit COMMAND ...`; cluster.address=local runs it here"
        )


def check_submission(config: ClusterConfig) -> None:
    """Raises UserError for values that no job can be submitted with."""
    if config.job is not None and not (_NAME.fullmatch(config.job) and len(config.job) <= 40):
        raise UserError(
            f"cluster.job={config.job}: use up to 40 lower case letters, digits and hyphens, a "
            "letter first"
        )
    if config.job_stop_timeout_s < 1 or config.max_upload_mib < 1:
        raise UserError("cluster.job_stop_timeout_s and cluster.max_upload_mib: at least 1")
    for name in config.env_vars:
        if not _VARIABLE.fullmatch(name):
            raise UserError(
                f"cluster.env_vars: {name!r} is no variable's name; list names, not values"
            )
    for role, group in {"head": config.head, **config.groups}.items():
        if group.replicas < 0 or group.cpus < 1 or group.gpus < 0:
            raise UserError(f"cluster.{role}: replicas and gpus from 0, cpus from 1")
