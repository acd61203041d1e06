"""Manifests against the schemas of Kubernetes and KubeRay, with unknown fields refused."""

import importlib
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lightning_ray import cli
from lightning_ray.cluster.config import ClusterConfig, GroupConfig
from lightning_ray.cluster.kuberay import render_ray_job

ROOT = Path(__file__).parents[2]
BASE = ROOT / "k8s" / "base"
KUBERNETES = "1.37"
SERVICE = "lightning_ray.jobs.service:build"

CLUSTER = ClusterConfig(
    address="kuberay",
    job="job-1",
    working_dir="local:///workspace",
    env_vars=["A_KEY"],
    groups={"inference": GroupConfig(replicas=2, gpus=1)},
)


Schemas = dict[str, jsonschema.Draft7Validator]


@pytest.fixture(scope="session")
def kuberay() -> Schemas:
    """The schema of each KubeRay resource, v1, by its kind."""
    folder = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
    if not folder.is_dir():
        pytest.skip(f"no KubeRay definitions in {folder}; set KUBERAY_CRDS to their folder")
    schemas: Schemas = {}
    for path in sorted(folder.glob("ray.io_*.yaml")):
        # PyYAML's own loader takes half a minute for them.
        spec = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        (version,) = [v for v in spec["versions"] if v["name"] == "v1"]
        schema = _closed(version["schema"]["openAPIV3Schema"], top=True)
        schemas[spec["names"]["kind"]] = jsonschema.Draft7Validator(schema)
    assert {"RayJob", "RayService", "RayCluster"} <= set(schemas)
    return schemas


def _closed(schema: dict[str, Any], top: bool = False) -> dict[str, Any]:
    """A structural schema in which every object refuses the fields that it does not name."""
    schema = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        properties = {name: _closed(one) for name, one in schema["properties"].items()}
        # Left open by every definition: the API server has a schema of its own for it.
        schema["properties"] = properties | ({"metadata": {"type": "object"}} if top else {})
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = _closed(schema["items"])
    return schema


def _resources() -> list[dict[str, Any]]:
    """The base as Kustomize renders it; where there is no kubectl, the files that it lists."""
    if shutil.which("kubectl"):
        done = subprocess.run(
            ["kubectl", "kustomize", str(BASE)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    texts = [(BASE / name).read_text() for name in listed]
    return [resource for text in texts for resource in yaml.safe_load_all(text)]


def _check(resource: dict[str, Any], kuberay: Schemas) -> None:
    """Raises jsonschema.ValidationError for a manifest that a cluster would not take."""
    if not resource["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        return
    kuberay[resource["kind"]].validate(resource)
    for pod in _pods(resource):
        # The definitions keep parts of a pod open; Kubernetes' own schema does not.
        whole = {"apiVersion": "v1", "kind": "Pod", **pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


def _pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    spec = resource["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_base_is_what_a_cluster_would_take(kuberay: Schemas) -> None:
    resources = _resources()
    for resource in resources:
        _check(resource, kuberay)
    # Runs and MLflow have a disk each.
    assert Counter(resource["kind"] for resource in resources) == {
        "Namespace": 1,
        "PersistentVolumeClaim": 2,
        "Deployment": 1,
        "Service": 1,
        "RayJob": 1,
        "RayService": 1,
    }


def test_every_name_that_the_base_refers_to_is_in_it() -> None:
    resources = _resources()
    have = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    for resource in resources:
        if resource["kind"] in ("RayJob", "RayService"):
            for pod in _pods(resource):
                for volume in pod["spec"]["volumes"]:
                    if claim := volume.get("persistentVolumeClaim"):
                        assert ("PersistentVolumeClaim", claim["claimName"]) in have
            assert "tracking.uri=http://mlflow:5000" in str(resource["spec"])
    assert ("Service", "mlflow") in have
    (service,) = [resource for resource in resources if resource["kind"] == "Service"]
    (deployment,) = [resource for resource in resources if resource["kind"] == "Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_bases_job_is_what_submit_renders(
    capsys: pytest.CaptureFixture[str], kuberay: Schemas
) -> None:
    words = ["submit", "train", "experiment=calculator", "cluster=kuberay"]
    assert cli.run([*words, "cluster.job=calculator"]) == 0
    rendered = yaml.safe_load(capsys.readouterr().out)
    assert rendered == yaml.safe_load((BASE / "rayjob.yaml").read_text())
    _check(rendered, kuberay)


def test_rollouts_inference_and_learner_are_told_to_go_to_their_groups() -> None:
    spec = yaml.safe_load((BASE / "rayjob.yaml").read_text())["spec"]
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["rollouts", "inference", "learner"]
    for group in groups:
        assert group["labels"] == {"lightning-ray/role": group["groupName"]}
        wanted = f"{group['groupName']}.node_labels={{lightning-ray/role:{group['groupName']}}}"
        assert wanted in spec["entrypoint"]


def test_what_ray_reads_inside_the_manifests_is_rays() -> None:
    from ray.runtime_env import RuntimeEnv
    from ray.serve.schema import ServeDeploySchema

    for resource in _resources():
        if resource["kind"] == "RayJob":
            env = RuntimeEnv(**yaml.safe_load(resource["spec"]["runtimeEnvYAML"]))
            assert env.working_dir() == "local:///workspace"
        if resource["kind"] == "RayService":
            serve = yaml.safe_load(resource["spec"]["serveConfigV2"])
            (application,) = ServeDeploySchema.model_validate(serve).applications
            assert application.import_path == SERVICE


def test_the_gateways_application_can_be_built() -> None:
    module, _, builder = SERVICE.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].update(entryPoint="x"),
        lambda job: job["spec"].update(backoffLimit="often"),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas="two"),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template"),
        lambda job: _pods(job)[0]["spec"]["containers"][0].update(imagePullPolice="Always"),
    ],
)
def test_a_misspelt_manifest_is_refused(kuberay: Schemas, spoil: Any) -> None:
    job = yaml.safe_load(render_ray_job(CLUSTER, ["version"]))
    _check(job, kuberay)
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        _check(job, kuberay)


def test_a_manifest_refers_to_secrets_and_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "opensesame")
    text = render_ray_job(CLUSTER, ["train", "experiment=calculator"])
    assert "opensesame" not in text
    for pod in _pods(yaml.safe_load(text)):
        (container,) = pod["spec"]["containers"]
        reference = {"secretKeyRef": {"name": "lightning-ray", "key": "A_KEY"}}
        assert {"name": "A_KEY", "valueFrom": reference} in container["env"]


def test_a_manifest_is_written_where_it_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    assert cli.run(["submit", "version", "cluster=kuberay", f"cluster.manifest={path}"]) == 0
    assert f"kubectl apply -f {path}" in capsys.readouterr().out
    job = yaml.safe_load(path.read_text())
    # A command without settings gets none.
    assert job["spec"]["entrypoint"] == "exec lightning-ray version"
    assert job["metadata"]["name"] == job["spec"]["jobId"]
