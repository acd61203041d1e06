"""Releases: which versions of a policy serve which share of the traffic, and why.

Invariant: a release is a pointer; moving it changes one tag of the registered model, at once and
whole, and never touches a version. Every change is kept, numbered, with its reason and author. The
MLflow aliases `champion` and `candidate` follow the pointer, for those who read the registry.

A version is named by the number that MLflow's registry gives it, which is its own across runs.
"""

import getpass
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_ray.errors import UserError
from lightning_ray.policies.registry import PolicyVersion, Weights, read_version
from lightning_ray.tracking.store import open_client

_TAG = "lightning_ray.release"
_KEPT_EARLIER = 10


@dataclass(frozen=True)
class Release:
    """Where the pointers of one policy stand."""

    number: int = 0
    """Counts the changes."""
    champion: int | None = None
    """The version that serves; None before the first promotion."""
    candidate: int | None = None
    """The version on trial beside it."""
    share: float = 0.0
    """Of new conversations, the share that the candidate answers; 0 without one."""
    earlier: tuple[int, ...] = ()
    """Former champions, the latest last: where a rollback goes."""
    action: str = ""
    """What the last change was: canary, promote, rollback."""
    reason: str = ""
    by: str = ""
    at: str = ""
    """When, ISO 8601, UTC."""

    @property
    def in_use(self) -> tuple[int, ...]:
        """The versions whose weights are needed, the most needed first."""
        return tuple(
            dict.fromkeys(
                version
                for version in (self.champion, self.candidate, *reversed(self.earlier))
                if version is not None
            )
        )


def canary(release: Release, version: int, share: float) -> Release:
    """Puts a version on trial. Raises UserError for what makes no trial."""
    if release.champion is None:
        raise UserError(
            f"there is no champion beside which version {version} could be tried; promote one first"
        )
    if version == release.champion:
        raise UserError(f"version {version} is the champion already; try another one")
    if not 0 < share < 1:
        raise UserError(f"share={share}: the candidate's share of the traffic lies between 0 and 1")
    return replace(release, candidate=version, share=share, action="canary")


def promote(release: Release, version: int | None) -> Release:
    """Makes a version, or the candidate where none is named, the champion."""
    chosen = release.candidate if version is None else version
    if chosen is None:
        raise UserError("there is no candidate to promote; name a version")
    if chosen == release.champion:
        raise UserError(f"version {chosen} is the champion already")
    champion = () if release.champion is None else (release.champion,)
    earlier = tuple(v for v in release.earlier if v not in (chosen, *champion)) + champion
    return replace(
        release,
        champion=chosen,
        candidate=None,
        share=0.0,
        earlier=earlier[-_KEPT_EARLIER:],
        action="promote",
    )


def rollback(release: Release) -> Release:
    """Withdraws the candidate; without one, goes back to the champion before this one."""
    if release.candidate is not None:
        return replace(release, candidate=None, share=0.0, action="rollback")
    if not release.earlier:
        raise UserError("there is no earlier champion to go back to; promote a version by number")
    return replace(
        release, champion=release.earlier[-1], earlier=release.earlier[:-1], action="rollback"
    )


class Releases:
    """The releases of every policy in the MLflow store `uri`."""

    def __init__(self, uri: str):
        """Opens the registry. Raises UserError when it cannot be opened."""
        self._client = open_client(uri)

    def policies(self) -> list[str]:
        """The names of all policies that have versions."""
        models = self._client.search_registered_models(max_results=1000)
        return sorted(model.name for model in models if "lightning_ray.policy" in model.tags)

    def get(self, policy: str) -> Release:
        """Where the pointers stand. Raises UserError for an unknown policy."""
        value = self._model(policy).tags.get(_TAG)
        return _parse(value) if value else Release()

    def history(self, policy: str) -> list[Release]:
        """Every change, oldest first."""
        tags = self._model(policy).tags
        return [_parse(tags[name]) for name in sorted(tags) if name.startswith(f"{_TAG}.")]

    def versions(self, policy: str) -> dict[int, PolicyVersion]:
        """Every version of the policy over all runs, by its number in the registry."""
        self._model(policy)
        entries = self._client.search_model_versions(f"name = '{policy}'", max_results=10_000)
        found = {int(entry.version): read_version(policy, entry) for entry in entries}
        return dict(sorted(found.items()))

    def needed_of_run(self, policy: str, run_id: str) -> set[int]:
        """The numbers, within the MLflow run, of the versions whose weights a release needs."""
        in_use = self.get(policy).in_use
        return {
            version.number
            for entry, version in self.versions(policy).items()
            if entry in in_use and version.run_id == run_id
        }

    def find(self, policy: str, name: str) -> int:
        """The number of a version that a user names: "7", "RUN/3" or "latest".

        Raises UserError when there is no such version, or its weights are gone.
        """
        versions = self.versions(policy)
        if name == "latest" and versions:
            number: int | None = max(versions)
        elif "/" in name:
            run, _, own = name.rpartition("/")
            matching = [n for n, v in versions.items() if v.run_id == run and str(v.number) == own]
            number = max(matching, default=None)
        else:
            number = int(name) if name.isdigit() else None
        version = versions.get(number) if number is not None else None
        if number is None or version is None:
            raise UserError(
                f"policy {policy} has no version {name!r}; it has {_span(list(versions))}"
            )
        if version.is_model and (version.weights is Weights.REMOVED or not version.path.is_dir()):
            raise UserError(
                f"the weights of version {number} of {policy} are no longer in {version.path}; "
                "choose another version"
            )
        return number

    def change(self, policy: str, to: Release, reason: str = "", by: str | None = None) -> Release:
        """Moves the pointers to `to`, made from what `get` said; returns it as it was kept."""
        kept = replace(
            to,
            number=to.number + 1,
            reason=reason,
            by=getpass.getuser() if by is None else by,
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        value = json.dumps(asdict(kept))
        self._client.set_registered_model_tag(policy, f"{_TAG}.{kept.number:06d}", value)
        # From here on it counts: one tag, written whole.
        self._client.set_registered_model_tag(policy, _TAG, value)
        for alias, version in (("champion", kept.champion), ("candidate", kept.candidate)):
            if version is None:
                self._client.delete_registered_model_alias(policy, alias)
            else:
                self._client.set_registered_model_alias(policy, alias, str(version))
        return kept

    def _model(self, policy: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(policy)
        except MlflowException as error:
            names = ", ".join(self.policies()) or "none yet: train one first"
            raise UserError(f"there is no policy {policy!r}; there are: {names}") from error


def _parse(value: str) -> Release:
    fields = json.loads(value)
    return Release(**{**fields, "earlier": tuple(fields["earlier"])})


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    shown = [str(number) for number in numbers[-20:]]
    return ("... " if len(numbers) > 20 else "") + ", ".join(shown)
