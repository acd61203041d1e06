"""lightning-ray serve: released versions behind the gateway, for live traffic.

    export WEB_API_KEY=...
    lightning-ray serve experiment=calculator +serving.keys.web=WEB_API_KEY gateway.port=8000

Each policy is answered by its release (`lightning-ray release`), or by its upstream. What callers
ask and what people say of the answers is kept as spans in the folder of this run.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lightning_ray.cluster import Connection, Needs
from lightning_ray.errors import UserError
from lightning_ray.gateway import (
    Role,
    Service,
    champions_of,
    check_gateway,
    check_serving,
    choose_port,
    make_roles,
    start_gateway,
    stop_gateway,
    upstream_answerer,
)
from lightning_ray.gateway.desk import digest_of
from lightning_ray.inference import check_inference
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.policies import PolicyConfig, Releases
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.mlflow_run import RunStatus
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import RunFolder, TrainConfig

_SHORTEST_KEY = 16
# Values of groups that serving has no use for, and that an experiment may leave open.
_UNUSED = ["agent.name=live", "agent.command=[live]", "agent.grader=live", "training.tasks=live"]


@dataclass(frozen=True)
class Prepared:
    """A service's settings, checked."""

    config: TrainConfig
    keys: dict[str, str]
    """The callers and the digests of their keys."""
    policies: dict[str, PolicyConfig]
    roles: tuple[Role, ...]
    releases: Releases

    @property
    def needs(self) -> Needs:
        """What its engines ask Ray for."""
        ours = sum(not policy.is_upstream for policy in self.policies.values())
        engines = ours * self.config.serving.max_engines
        inference = self.config.inference
        return Needs(cpus=engines * inference.num_cpus, gpus=engines * inference.num_gpus)


def main(arguments: Sequence[str]) -> None:
    """Serves until it is stopped. Raises UserError for what the user can mend."""
    prepared = prepare(arguments)
    config = prepared.config
    port = choose_port(config.gateway)
    folder = RunFolder.create(Path(config.output_dir), f"serve-{config.name}", list(arguments))
    with Progress(0, title=folder.run_id, mode="plain") as progress:
        tracked = track(config, folder)
        status = RunStatus.FAILED
        try:
            with Connection(config.cluster, prepared.needs):
                service = service_of(prepared, progress.note)
                with progress.phase("starting the vLLM engines", slow=True):
                    live = service.start(folder.run_id, folder.spans, config.spans, prepared.keys)
                with ExitStack() as stack:
                    stack.callback(service.stop)
                    stack.callback(stop_gateway, folder.run_id)
                    job, store = folder.run_id, service.store
                    url = start_gateway(
                        config.gateway, port, job, None, prepared.roles, [], store, live
                    )
                    progress.note(f"serving at {url}/v1   spans in {folder.spans}")
                    service.follow()
        except KeyboardInterrupt:
            # How serving ends.
            status = RunStatus.FINISHED
            progress.note("stopped")
        finally:
            tracked.finish(status)


def prepare(arguments: Sequence[str]) -> Prepared:
    """Composes and checks the settings of a service, before anything starts."""
    config = compose_config("train", TrainConfig, [*arguments, *_UNUSED])
    check_gateway(config.gateway)
    check_serving(config.serving)
    check_inference(config.inference)
    keys = _read_keys(config.serving.keys)
    policies = config.policies or {config.policy.name: config.policy}
    roles = make_roles(config.gateway, next(iter(policies)), list(policies))
    for policy in policies.values():
        if policy.is_upstream:
            upstream_answerer(policy)
    releases = Releases(config.tracking.uri or default_uri(Path(config.output_dir)))
    champions_of(releases, policies)
    return Prepared(config, keys, policies, roles, releases)


def service_of(prepared: Prepared, say: Callable[[str], None]) -> Service:
    """The service that was prepared."""
    config = prepared.config
    return Service(
        config.serving, config.inference, prepared.policies, prepared.roles, prepared.releases, say
    )


def track(config: TrainConfig, folder: RunFolder) -> TrackedRun:
    """The service's MLflow run."""
    tracked = TrackedRun.start(config.tracking, folder.path.parent, folder.run_id)
    folder.write_facts({"mlflow_run_id": tracked.run_id})
    tracked.log_config(resolved(config))
    return tracked


def _read_keys(names: dict[str, str]) -> dict[str, str]:
    """The digests of the callers' keys. Raises UserError for a key that is no key."""
    digests = {}
    for caller, variable in names.items():
        key = os.environ.get(variable, "")
        if len(key) < _SHORTEST_KEY:
            raise UserError(
                f"serving.keys.{caller}: the environment variable {variable} is to hold a key of "
                f"at least {_SHORTEST_KEY} characters; it holds {len(key)}"
            )
        digests[caller] = digest_of(key)
    if len(set(digests.values())) < len(digests):
        raise UserError("serving.keys: two callers have the same key; give each its own")
    return digests
