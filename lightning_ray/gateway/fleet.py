"""The fleet: which released versions of one policy have engines, and giving engines to others.

Invariants: the champion has engines as long as there are any; a version is taken off its engines
only when no release needs it and no conversation stays on it. Loading goes on in the background, so
that a change among versions that are loaded takes effect at once.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.desk import LivePolicy
from lightning_ray.inference import InferenceConfig, InferenceGroup
from lightning_ray.policies import Release
from lightning_ray.spans import SpanClient

log = logging.getLogger(__name__)


class Fleet:
    """The engines of one policy; one thread calls it."""

    def __init__(
        self,
        config: InferenceConfig,
        policy: str,
        names: Sequence[str],
        spans: SpanClient,
        max_engines: int,
    ):
        """`names` are the model names under which the policy is asked for."""
        self._config = config
        self._policy = policy
        self._names = list(names)
        self._spans = spans
        self._max = max_engines
        self._groups: dict[int, InferenceGroup] = {}
        self._loading: tuple[int, Future[InferenceGroup]] | None = None
        self._next: tuple[int, Callable[[], InferenceGroup]] | None = None
        self._failed: dict[int, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"fleet-{policy}")

    @property
    def loaded(self) -> list[int]:
        """The versions that have engines."""
        return sorted(self._groups)

    @property
    def loading(self) -> int | None:
        """The version that engines are being given to."""
        return self._loading[0] if self._loading else None

    def load_first(self, version: int, folder: Path) -> None:
        """Starts the first engines and waits for them. Raises what `InferenceGroup` raises."""
        self._groups[version] = self._start(version, folder)

    def settle(
        self,
        release: Release,
        folders: Mapping[int, Path],
        active_on: Callable[[int], int],
    ) -> list[str]:
        """Brings the engines nearer to what the release needs; returns what there is to say.

        Does not wait; loading begins with `begin`. `folders` are the weights by version;
        `active_on` counts the conversations that stay on a version.
        """
        said = self._take_loaded()
        if self._loading is not None:
            return said
        missing = [v for v in (release.champion, release.candidate) if v not in self._groups]
        wanted = next((v for v in missing if v is not None and v not in self._failed), None)
        if wanted is None:
            return said
        folder = folders[wanted]
        if len(self._groups) < self._max:
            self._next = (wanted, lambda: self._start(wanted, folder))
            return [*said, f"{self._policy}: starting engines for version {wanted}"]
        leaving = self._dispensable(release, active_on)
        if leaving is None:
            return said
        group = self._groups.pop(leaving)
        self._next = (wanted, lambda: self._reload(group, wanted, folder))
        return [*said, f"{self._policy}: version {wanted} takes the engines of version {leaving}"]

    def begin(self) -> None:
        """Begins the loading that `settle` decided on.

        Called once the desk no longer sends anybody to the engines that are given away.
        """
        if self._next is not None:
            version, load = self._next
            self._loading = (version, self._thread.submit(load))
            self._next = None

    def live(self, release: Release, champion: int) -> LivePolicy:
        """How calls are to be shared out now; `champion` serves until the release's is loaded."""
        loaded = self._groups
        if release.champion in loaded and release.champion is not None:
            champion = release.champion
        candidate = release.candidate if release.candidate in loaded else None
        answerers = {v: Answerer(self._policy, tuple(g.urls), g.key) for v, g in loaded.items()}
        share = release.share if candidate is not None else 0.0
        return LivePolicy(self._policy, answerers, champion, candidate, share)

    def stop(self) -> None:
        """Ends every engine."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for group in self._groups.values():
            group.stop()

    def _take_loaded(self) -> list[str]:
        if self._loading is None or not self._loading[1].done():
            return []
        version, future = self._loading
        self._loading = None
        error = future.exception()
        if error is not None:
            # Said once, and not tried again and again: the operator chooses another version.
            self._failed[version] = str(error)
            return [f"{self._policy}: version {version} cannot be loaded: {error}"]
        self._groups[version] = future.result()
        return [f"{self._policy}: version {version} is loaded"]

    def _dispensable(self, release: Release, active_on: Callable[[int], int]) -> int | None:
        """A loaded version that may leave: needed by nobody, or the least so of former ones."""
        needed = (release.champion, release.candidate)
        free = [v for v in self._groups if v not in needed and active_on(v) == 0]
        ranked = {v: place for place, v in enumerate(release.earlier, 1)}
        return min(free, key=lambda version: ranked.get(version, 0), default=None)

    def _start(self, version: int, folder: Path) -> InferenceGroup:
        group = InferenceGroup(
            self._config, str(folder), self._policy, self._names, version, self._spans
        )
        group.wait_ready()
        return group

    @staticmethod
    def _reload(group: InferenceGroup, version: int, folder: Path) -> InferenceGroup:
        try:
            group.update_weights(str(folder), version, drain=True)
        except InfrastructureError:
            group.stop()
            raise
        return group
