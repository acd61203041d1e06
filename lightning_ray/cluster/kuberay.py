"""A job as a RayJob, the custom resource of the KubeRay operator.

Invariant: the manifest holds no secret. The variables of `cluster.env_vars` are references into the
Secret `cluster.secret`, and the cluster's token is made by the operator.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import yaml

from lightning_ray.cluster.config import ClusterConfig, GroupConfig
from lightning_ray.cluster.plain_yaml import PlainDumper
from lightning_ray.cluster.submission import make_submission, runtime_env, stop_limit
from lightning_ray.errors import UserError

ROLE = "lightning-ray/role"
"""Label of a worker group's nodes; `rollouts.node_labels` and its like select by it."""
DATA = "/data"
"""Where every pod mounts the claim `cluster.pvc`."""
KEEP_CLUSTER_S = 600
"""How long the pods stay after the job's end, for whoever wants to read their logs."""


def render_ray_job(config: ClusterConfig, words: Sequence[str]) -> str:
    """The RayJob that runs `lightning-ray WORDS`, YAML.

    Raises UserError when the project does not lie where pods can reach it.
    """
    if "://" not in config.working_dir:
        raise UserError(
            f"cluster.working_dir={config.working_dir}: pods cannot reach a folder of this "
            "machine; name one of the image (local:///FOLDER) or a package (https://..., s3://...)"
        )
    # The values stay in the Secret, so none is looked up here.
    submission = make_submission(config, words, dict.fromkeys(config.env_vars, ""))
    env = {**runtime_env(config), "env_vars": stop_limit(config)}
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": submission.job,
            "namespace": config.namespace,
            "labels": _labels("job"),
        },
        "spec": {
            "jobId": submission.job,
            # The operator posts the command as it is; with K8sJobMode a second shell would read it.
            "submissionMode": "HTTPMode",
            "entrypoint": submission.entrypoint,
            "runtimeEnvYAML": yaml.dump(env, Dumper=PlainDumper, sort_keys=False),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_CLUSTER_S,
            "rayClusterSpec": ray_cluster(config),
        },
    }
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=100)


def ray_cluster(config: ClusterConfig) -> dict[str, Any]:
    """The cluster: a head, and a worker group for each of `cluster.groups`."""
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # Nothing that asks for a processor is placed on the head.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": _pod(config, config.head, "ray-head"),
        },
        "workerGroupSpecs": [
            {
                "groupName": role,
                "replicas": group.replicas,
                "minReplicas": group.replicas,
                "maxReplicas": group.replicas,
                "labels": {ROLE: role},
                "rayStartParams": {},
                "template": _pod(config, group, "ray-worker"),
            }
            for role, group in config.groups.items()
        ],
    }


def _pod(config: ClusterConfig, group: GroupConfig, name: str) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(group.cpus), "memory": group.memory}
    if group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
    env: list[dict[str, Any]] = [
        # Converted models lie where every pod sees them.
        {"name": "LIGHTNING_RAY_CACHE", "value": f"{DATA}/cache"},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
    ]
    for variable in config.env_vars:
        reference = {"secretKeyRef": {"name": config.secret, "key": variable}}
        env.append({"name": variable, "valueFrom": reference})
    return {
        "metadata": {"labels": _labels(name)},
        "spec": {
            "containers": [
                {
                    "name": name,
                    "image": config.image,
                    "env": env,
                    "resources": {"requests": amounts, "limits": dict(amounts)},
                    "volumeMounts": [
                        {"name": "data", "mountPath": DATA},
                        # Ray's object store; the container's own /dev/shm has 64 MiB.
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": config.pvc}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


def _labels(component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "lightning-ray",
        "app.kubernetes.io/component": component,
    }


class _Dumper(PlainDumper):
    """Writes text of several lines as such, and repeats what is the same in place of `&id001`."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
