"""lightning-ray serve: released versions behind the gateway, for live traffic.

    export WEB_API_KEY=...
    lightning-ray serve experiment=calculator +serving.keys.web=WEB_API_KEY gateway.port=8000

Each policy is answered by its release (`lightning-ray release`), or by its upstream. What callers
ask and what people say of the answers is kept as spans in the folder of this run.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning_ray.cluster import Connection, Needs
from lightning_ray.errors import UserError
from lightning_ray.gateway import (
    Answerer,
    Fleet,
    LiveDoor,
    check_gateway,
    check_serving,
    choose_port,
    make_roles,
    models_of,
    start_desk,
    start_gateway,
    stop_gateway,
    upstream_answerer,
)
from lightning_ray.gateway.desk import LivePolicy, digest_of
from lightning_ray.gateway.live import DeskClient
from lightning_ray.inference import check_inference
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.policies import Release, Releases
from lightning_ray.spans import start_store
from lightning_ray.tracking import Progress, TrackedRun
from lightning_ray.tracking.mlflow_run import RunStatus
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import RunFolder, TrainConfig

_SHORTEST_KEY = 16
# Values of groups that serving has no use for, and that an experiment may leave open.
_UNUSED = ["agent.name=live", "agent.command=[live]", "agent.grader=live", "training.tasks=live"]


@dataclass
class _Served:
    """A policy with engines of ours, and where its release stands."""

    fleet: Fleet
    release: Release
    champion: int


def main(arguments: Sequence[str]) -> None:
    """Serves until it is stopped. Raises UserError for what the user can mend."""
    config = compose_config("train", TrainConfig, [*arguments, *_UNUSED])
    check_gateway(config.gateway)
    check_serving(config.serving)
    check_inference(config.inference)
    keys = _read_keys(config.serving.keys)
    policies = config.policies or {config.policy.name: config.policy}
    roles = make_roles(config.gateway, next(iter(policies)), list(policies))
    upstreams = [upstream_answerer(p) for p in policies.values() if p.is_upstream]
    root = Path(config.output_dir)
    releases = Releases(config.tracking.uri or default_uri(root))
    ours = {name: policy for name, policy in policies.items() if not policy.is_upstream}
    champions = {name: _champion(releases, name) for name in ours}
    port = choose_port(config.gateway)
    folder = RunFolder.create(root, f"serve-{config.name}", list(arguments))
    needs = Needs(
        cpus=len(ours) * config.serving.max_engines * config.inference.num_cpus,
        gpus=len(ours) * config.serving.max_engines * config.inference.num_gpus,
    )
    with Progress(0, title=folder.run_id, mode="plain") as progress:
        tracked = TrackedRun.start(config.tracking, folder.path.parent, folder.run_id)
        folder.write_facts({"mlflow_run_id": tracked.run_id})
        tracked.log_config(resolved(config))
        status = RunStatus.FAILED
        try:
            with Connection(config.cluster, needs):
                store = start_store(str(folder.spans), config.spans)
                desk = start_desk(folder.run_id, keys, config.serving.conversation_idle_s)
                served = {}
                with progress.phase("starting the vLLM engines", slow=True):
                    for name in ours:
                        names = models_of(roles, name)
                        limit = config.serving.max_engines
                        fleet = Fleet(config.inference, name, names, store, limit)
                        champion = champions[name]
                        fleet.load_first(champion, _folders(releases, name)[champion])
                        served[name] = _Served(fleet, Release(champion=champion), champion)
                desk.release([_upstream_policy(answerer) for answerer in upstreams])
                _follow(releases, served, desk, progress, everything=True)
                live = LiveDoor(desk.actor, config.serving, folder.run_id)
                url = start_gateway(config.gateway, port, None, roles, [], store, live)
                progress.note(f"serving at {url}/v1   spans in {folder.spans}")
                try:
                    _serve(releases, served, desk, progress, config.serving.poll_s)
                finally:
                    stop_gateway()
                    for one in served.values():
                        one.fleet.stop()
                    store.close()
        except KeyboardInterrupt:
            # How serving ends.
            status = RunStatus.FINISHED
            progress.note("stopped")
        finally:
            tracked.finish(status)


def _serve(
    releases: Releases,
    served: dict[str, _Served],
    desk: DeskClient,
    progress: Progress,
    poll_s: float,
) -> None:
    """Follows the releases until it is stopped. A registry that fails does not stop the service."""
    from sqlalchemy.exc import SQLAlchemyError

    last = ""
    while True:
        time.sleep(poll_s)
        try:
            _follow(releases, served, desk, progress)
            last = ""
        except (UserError, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0]
            if reason != last:
                progress.note(f"the registry cannot be read, serving goes on as it is: {reason}")
            last = reason


def _follow(
    releases: Releases,
    served: dict[str, _Served],
    desk: DeskClient,
    progress: Progress,
    everything: bool = False,
) -> None:
    """Takes on what operators changed since the last look, and what was loaded meanwhile."""
    for name, one in served.items():
        release = releases.get(name)
        if release.champion is None:
            continue
        changed = everything or release.number != one.release.number
        if changed:
            progress.note(f"{name}: {_stands(release)}")
        one.release = release
        said = one.fleet.settle(
            release, _LazyFolders(releases, name), partial(desk.active_on, name)
        )
        for line in said:
            progress.note(line)
        if changed or said:
            live = one.fleet.live(release, one.champion)
            one.champion = live.champion
            desk.release([live])
        one.fleet.begin()


class _LazyFolders(dict[int, Path]):
    """The weights of every version of a policy, looked up when one is needed."""

    def __init__(self, releases: Releases, policy: str):
        super().__init__()
        self._releases = releases
        self._policy = policy

    def __missing__(self, version: int) -> Path:
        self.update(_folders(self._releases, self._policy))
        return self.get(version, Path("missing"))


def _folders(releases: Releases, policy: str) -> dict[int, Path]:
    return {number: version.path for number, version in releases.versions(policy).items()}


def _champion(releases: Releases, policy: str) -> int:
    """The version to begin with. Raises UserError when none has been promoted."""
    champion = releases.get(policy).champion
    if champion is None:
        raise UserError(
            f"no version of {policy} is released; choose one of `lightning-ray release status "
            f"{policy}` and type `lightning-ray release promote {policy} VERSION`"
        )
    return releases.find(policy, str(champion))


def _upstream_policy(answerer: Answerer) -> LivePolicy:
    return LivePolicy(answerer.policy, {0: answerer}, 0)


def _stands(release: Release) -> str:
    text = f"version {release.champion} serves"
    if release.candidate is not None:
        text += f", version {release.candidate} takes {release.share:.0%} of new conversations"
    return text


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
