"""The versions that a run makes: numbered, written, registered with their lineage, and pruned.

Invariant: numbers only go up, over a resume too, and a version is never overwritten.
"""

from collections.abc import Collection
from pathlib import Path

from lightning_ray.learner import LearnerGroup
from lightning_ray.policies import PolicyConfig, PolicyRegistry, PolicyVersion, Releases, prune
from lightning_ray.policies.adapters import is_adapter
from lightning_ray.training.folder import RunFolder

PUBLISH_TIMEOUT_S = 300.0


class Versions:
    """The versions of one policy in one run."""

    def __init__(self, policy: PolicyConfig, folder: RunFolder, registry: PolicyRegistry):
        self._policy = policy
        self._folder = folder
        self._registry = registry

    def register(
        self,
        number: int,
        path: Path,
        parent: int | None,
        step: int,
        created_by: str,
        digest: str | None = None,
    ) -> None:
        """Enters a version whose weights lie in `path`; `digest` is the `Checksum` of what
        was sent of them."""
        self._registry.register(
            PolicyVersion(
                policy=self._policy.name,
                number=number,
                path=path,
                run_id=self._registry.run_id,
                parent=parent,
                step=step,
                created_by=created_by,
                digest=digest,
                base_model=self._policy.model,
                kind="adapter" if is_adapter(path) else "weights",
            )
        )

    def path(self, number: int) -> Path:
        """Where the weights of a version lie that the run made."""
        return self._folder.version(self._policy.name, number)

    def next(self, parent: int) -> int:
        """The number of a version that is made now, from `parent`."""
        # Those that a run lost when it was stopped keep their numbers.
        return max(self._folder.last_version(self._policy.name), parent) + 1

    def publish(
        self, learner: LearnerGroup, parent: int, step: int, created_by: str
    ) -> tuple[int, Path]:
        """Writes the learner's weights as the next version, made from `parent`, and registers it.

        Returns its number and the folder of its weights.
        """
        number = self.next(parent)
        path = learner.publish(self.path(number), PUBLISH_TIMEOUT_S)
        self.register(number, path, parent, step, created_by)
        return number, path

    def clear_up(self) -> None:
        """Frees what versions take that were never written whole, or never registered because the
        run ended before; their numbers stay taken."""
        known = {version.number for version in self._registry.versions()}
        for number in self._folder.whole_versions(self._policy.name):
            if number not in known:
                self._folder.take_back_version(self._policy.name, number)
        self._folder.empty_partial_versions(self._policy.name)

    def prune(self, pinned: Collection[int]) -> None:
        """Removes the weights of old versions, but for those that a checkpoint needs, `pinned`,
        and those that are released."""
        released = Releases(self._registry.uri).needed_of_run(
            self._policy.name, self._registry.run_id
        )
        prune(
            self._registry,
            self._folder.versions_of(self._policy.name),
            keep=self._policy.keep_versions,
            pinned={*pinned, *released},
        )
