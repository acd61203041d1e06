"""Configuration of the compatibility check: a job's groups, and what to run the agent on."""

from dataclasses import dataclass

from lightning_ray.cluster import check_cluster
from lightning_ray.errors import UserError
from lightning_ray.gateway import check_gateway
from lightning_ray.inference import check_inference
from lightning_ray.rollouts import check_rollouts
from lightning_ray.spans import check_spans
from lightning_ray.training import TrainConfig


@dataclass
class DoctorConfig(TrainConfig):
    """The parts are configured as for training, so what is seen is what a trainer would see."""

    tasks: str | None = None
    """JSONL file of tasks; null runs the command as it is, without a task."""
    count: int = 3
    """Tasks to run, the first of the file."""
    samples: int = 2
    """Runs of each task. From 2 on the check sees whether two runs of a task differ."""
    grader: str | None = None
    """Also judge the runs: path/to/file.py:function or package.module:function."""
    json: str | None = None
    """File to write the report to as well, as JSON."""


def check_doctor(config: DoctorConfig) -> None:
    """Checks every value that can be checked without loading anything. Raises UserError."""
    for name in ("count", "samples"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)}: must be at least 1")
    if config.cluster.address != "local":
        raise UserError(
            f"cluster.address={config.cluster.address}: doctor listens between the agent and the "
            "gateway on this machine; use cluster.address=local"
        )
    check_inference(config.inference)
    check_rollouts(config.rollouts)
    check_spans(config.spans)
    check_gateway(config.gateway)
    check_cluster(config.cluster)
