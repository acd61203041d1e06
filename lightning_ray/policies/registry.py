"""The versions of one policy in one run, kept in MLflow's model registry.

Invariant: a version is never overwritten. Registering it again changes nothing; a version that a
resumed run made anew, under a number that was already given, becomes an entry of its own and
supersedes the earlier one, which stays in the registry.

How our numbers map to MLflow's: one registered model per policy, across runs, so that an alias can
point at any run's version. MLflow counts the entries of a registered model from 1 in the order in
which they come. Ours count from 0 (the base) within each run, and are the tag
`lightning_ray.version`; (`lightning_ray.run`, `lightning_ray.version`) names a version. MLflow
copies nothing: an entry's source is the folder where the weights lie. Aliases are `releases`'s.
"""

import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from lightning_ray.errors import UserError
from lightning_ray.tracking.store import is_server, open_client

_PREFIX = "lightning_ray."
_SOURCE_SCHEME = "lightning-ray"
_PAGE = 1000


class Weights(StrEnum):
    """Whether a version's weights can still be read."""

    PRESENT = "present"
    REMOVED = "removed by retention"
    """Its folder was deleted to save space; the entry and its lineage stay."""


@dataclass(frozen=True)
class PolicyVersion:
    """An immutable numbered state of a policy, and where it came from."""

    policy: str
    number: int
    """From 0, the base, within the run."""
    path: Path
    """The folder of its weights, absolute."""
    run_id: str
    """The MLflow run that made it."""
    parent: int | None
    """The version it was made from; None for the base."""
    step: int
    """The training step after which it was made; 0 for the base."""
    kind: str = "weights"
    """What it consists of: "weights" is a Hugging Face folder of the full model, "adapter" one of
    additions to a model that lies elsewhere."""
    created_by: str = ""
    """What made it, in words."""
    digest: str | None = None
    """A checksum of its weights, where one was taken."""
    base_model: str = ""
    """The model that version 0 is, as the user named it."""
    weights: Weights = Weights.PRESENT
    """Set by the registry."""

    @property
    def is_model(self) -> bool:
        """Whether engines can load it from its folder."""
        return self.kind in ("weights", "adapter")


class PolicyRegistry:
    """The versions of the policy `name` that the MLflow run `run_id` made, in the store `uri`.

    Methods may be called from several threads of one process. Only one process at a time may
    register versions of a run.
    """

    def __init__(self, uri: str, name: str, run_id: str) -> None:
        """Open the registry.

        Raises:
            UserError: the store cannot be opened, or `name` is no name for a registered model.
        """
        if not name.strip() or any(character in name for character in "/:\"'`\\"):
            raise UserError(
                f"policy.name={name!r}: give it a name without slashes, colons and quotes"
            )
        self.name = name
        self.run_id = run_id
        self.uri = uri
        self._client = open_client(uri)
        # An MLflow server refuses a source on a local path outside the run's own artifacts.
        self._host = socket.gethostname() if is_server(uri) else None
        self._lock = threading.Lock()
        self._known_model = False

    def register(self, version: PolicyVersion) -> None:
        """Enter `version`. Entering it a second time changes nothing.

        Where the number was given before and only the digest differs, a resumed run made the
        version anew: it supersedes the earlier entry.

        Raises:
            ValueError: the version is of another policy or run, or its number was given to a
                version with another parent, step, kind or path.
        """
        if (version.policy, version.run_id) != (self.name, self.run_id):
            raise ValueError(
                f"version {version.number} of {version.policy!r} in run {version.run_id} does not "
                f"belong to the registry of {self.name!r} in run {self.run_id}"
            )
        version = replace(version, path=version.path.absolute(), weights=Weights.PRESENT)
        with self._lock:
            self._ensure_model()
            earlier = self._newest(self._search(version.number)).get(version.number)
            superseded = None
            if earlier is not None:
                found = read_version(self.name, earlier)
                _refuse_other(found, version)
                if found.digest == version.digest:
                    if found.weights is not Weights.PRESENT and version.path.exists():
                        self._tag(earlier, "weights", Weights.PRESENT)
                    return
                superseded = str(earlier.version)
            self._client.create_model_version(
                self.name,
                self._source(version.path),
                run_id=self.run_id,
                tags=_tags(version, superseded),
                description=f"version {version.number} of run {self.run_id}, step {version.step}",
                await_creation_for=0,
            )

    def versions(self) -> list[PolicyVersion]:
        """Every version of the run, by ascending number; superseded ones are left out."""
        newest = self._newest(self._search())
        return [read_version(self.name, newest[number]) for number in sorted(newest)]

    def get(self, number: int) -> PolicyVersion:
        """The version `number`.

        Raises:
            UserError: the run has no such version.
        """
        entry = self._newest(self._search(number)).get(number)
        if entry is None:
            raise UserError(
                f"policy {self.name!r} has no version {number} in run {self.run_id}: "
                f"it has {[version.number for version in self.versions()]}"
            )
        return read_version(self.name, entry)

    def latest(self) -> PolicyVersion:
        """The version with the highest number.

        Raises:
            UserError: the run has no version yet.
        """
        versions = self.versions()
        if not versions:
            raise UserError(f"policy {self.name!r} has no version in run {self.run_id}")
        return versions[-1]

    def mark_weights(self, number: int, weights: Weights) -> None:
        """Record whether the weights of version `number` can be read."""
        with self._lock:
            self._tag(self._newest(self._search(number))[number], "weights", weights)

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        if self._known_model:
            return
        try:
            self._client.create_registered_model(self.name, tags={f"{_PREFIX}policy": self.name})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._known_model = True

    def _search(self, number: int | None = None) -> list[Any]:
        """The run's entries in MLflow, or those of one version."""
        query = f"name = '{self.name}' and tags.`{_PREFIX}run` = '{self.run_id}'"
        if number is not None:
            query += f" and tags.`{_PREFIX}version` = '{number}'"
        entries: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(query, max_results=_PAGE, page_token=token)
            entries += page
            token = page.token
            if not token:
                return entries

    @staticmethod
    def _newest(entries: list[Any]) -> dict[int, Any]:
        """By our number, the entry that came last: one that was superseded came before."""
        ordered = sorted(entries, key=lambda entry: int(entry.version))
        return {int(entry.tags[f"{_PREFIX}version"]): entry for entry in ordered}

    def _tag(self, entry: Any, name: str, value: str) -> None:
        self._client.set_model_version_tag(
            self.name, str(entry.version), f"{_PREFIX}{name}", str(value)
        )

    def _source(self, path: Path) -> str:
        if self._host is None:
            return str(path)
        return f"{_SOURCE_SCHEME}://{self._host}{quote(path.as_posix())}"


def _refuse_other(found: PolicyVersion, version: PolicyVersion) -> None:
    for name in ("parent", "step", "kind", "path"):
        if getattr(found, name) != getattr(version, name):
            raise ValueError(
                f"version {version.number} of {version.policy!r} is registered with {name} "
                f"{getattr(found, name)}, not {getattr(version, name)}: "
                "a version is never overwritten"
            )


def _tags(version: PolicyVersion, superseded: str | None) -> dict[str, str]:
    tags = {
        "run": version.run_id,
        "version": str(version.number),
        "step": str(version.step),
        "kind": version.kind,
        "weights": version.weights.value,
    }
    optional: Mapping[str, str | int | None] = {
        "parent": version.parent,
        "created_by": version.created_by or None,
        "digest": version.digest,
        "base_model": version.base_model or None,
        "supersedes": superseded,
    }
    tags |= {name: str(value) for name, value in optional.items() if value is not None}
    return {f"{_PREFIX}{name}": value for name, value in tags.items()}


def read_version(policy: str, entry: Any) -> PolicyVersion:
    """A version from its entry in MLflow's registry."""
    tags = {name.removeprefix(_PREFIX): value for name, value in entry.tags.items()}
    source = urlsplit(entry.source)
    remote = source.scheme == _SOURCE_SCHEME
    return PolicyVersion(
        policy=policy,
        number=int(tags["version"]),
        path=Path(unquote(source.path) if remote else entry.source),
        run_id=tags["run"],
        parent=int(tags["parent"]) if "parent" in tags else None,
        step=int(tags["step"]),
        kind=tags["kind"],
        created_by=tags.get("created_by", ""),
        digest=tags.get("digest"),
        base_model=tags.get("base_model", ""),
        weights=Weights(tags["weights"]),
    )
