"""A service of live traffic: store, desk and fleets, following what operators release.

Invariant: it goes on with what it has whatever becomes of the registry; it is stopped once, whole.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning_ray.errors import UserError
from lightning_ray.gateway.answerers import upstream_answerer
from lightning_ray.gateway.config import ServingConfig
from lightning_ray.gateway.desk import LivePolicy
from lightning_ray.gateway.fleet import Fleet
from lightning_ray.gateway.live import LiveDoor, start_desk
from lightning_ray.gateway.roles import Role, models_of
from lightning_ray.inference import InferenceConfig
from lightning_ray.policies import PolicyConfig, Release, Releases
from lightning_ray.spans import SpansConfig, start_store


@dataclass
class _Served:
    """A policy with engines of ours, and where its release stands."""

    fleet: Fleet
    release: Release
    champion: int


def champions_of(releases: Releases, policies: Mapping[str, PolicyConfig]) -> dict[str, int]:
    """The version that each policy with engines of ours begins with.

    Raises UserError when a policy has no release, or its weights are gone.
    """
    found = {}
    for name, policy in policies.items():
        if policy.is_upstream:
            continue
        champion = releases.get(name).champion
        if champion is None:
            raise UserError(
                f"no version of {name} is released; choose one of `lightning-ray release status "
                f"{name}` and type `lightning-ray release promote {name} VERSION`"
            )
        found[name] = releases.find(name, str(champion))
    return found


class Service:
    """What stands behind the door of live traffic; Ray must be up. One thread calls it."""

    def __init__(
        self,
        serving: ServingConfig,
        inference: InferenceConfig,
        policies: Mapping[str, PolicyConfig],
        roles: Sequence[Role],
        releases: Releases,
        say: Callable[[str], None],
    ):
        """`say` is told what a person who watches should know, a line at a time."""
        self._serving = serving
        self._inference = inference
        self._policies = dict(policies)
        self._roles = list(roles)
        self._releases = releases
        self._say = say
        self._served: dict[str, _Served] = {}

    def start(
        self, run_id: str, spans_folder: Path, spans: SpansConfig, keys: Mapping[str, str]
    ) -> LiveDoor:
        """Starts everything behind the door, the champions' engines among it; returns what the
        door needs. `keys` are the callers' digests."""
        champions = champions_of(self._releases, self._policies)
        upstreams = [upstream_answerer(p) for p in self._policies.values() if p.is_upstream]
        self.store = start_store(str(spans_folder), spans)
        self._desk = start_desk(run_id, keys, self._serving.conversation_idle_s)
        for name, champion in champions.items():
            fleet = Fleet(
                self._inference,
                name,
                models_of(self._roles, name),
                self.store,
                self._serving.max_engines,
            )
            self._served[name] = _Served(fleet, Release(champion=champion), champion)
            fleet.load_first(champion, self._folders(name)[champion])
        self._desk.release([LivePolicy(u.policy, {0: u}, 0) for u in upstreams])
        self._follow(everything=True)
        return LiveDoor(self._desk.actor, self._serving, run_id)

    def follow(self, going_on: Callable[[], bool] = lambda: True) -> None:
        """Follows the releases for as long as `going_on`."""
        from sqlalchemy.exc import SQLAlchemyError

        last = ""
        while going_on():
            time.sleep(self._serving.poll_s)
            try:
                self._follow()
                last = ""
            except (UserError, SQLAlchemyError) as error:
                reason = str(error).splitlines()[0]
                if reason != last:
                    self._say(f"the registry cannot be read, serving goes on as it is: {reason}")
                last = reason

    def stop(self) -> None:
        """Ends the engines and closes the store."""
        for one in self._served.values():
            one.fleet.stop()
        self.store.close()

    def _follow(self, everything: bool = False) -> None:
        """Takes on what operators changed since the last look, and what was loaded meanwhile."""
        for name, one in self._served.items():
            release = self._releases.get(name)
            if release.champion is None:
                continue
            changed = everything or release.number != one.release.number
            if changed:
                self._say(f"{name}: {stands(release)}")
            one.release = release
            said = one.fleet.settle(
                release, _LazyFolders(self._folders, name), partial(self._desk.active_on, name)
            )
            for line in said:
                self._say(line)
            if changed or said:
                live = one.fleet.live(release, one.champion)
                one.champion = live.champion
                self._desk.release([live])
            one.fleet.begin()

    def _folders(self, policy: str) -> dict[int, Path]:
        return {n: version.path for n, version in self._releases.versions(policy).items()}


class _LazyFolders(dict[int, Path]):
    """The weights of every version of a policy, looked up when one is needed."""

    def __init__(self, look_up: Callable[[str], dict[int, Path]], policy: str):
        super().__init__()
        self._look_up = look_up
        self._policy = policy

    def __missing__(self, version: int) -> Path:
        self.update(self._look_up(self._policy))
        return self.get(version, Path("missing"))


def stands(release: Release) -> str:
    """Where a release stands, in words."""
    text = "no version serves" if release.champion is None else f"version {release.champion} serves"
    if release.candidate is not None:
        text += f", version {release.candidate} takes {release.share:.0%} of new conversations"
    return text
