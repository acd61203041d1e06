"""The group of engines: starting them, handing them new weights, stopping them."""

import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.inference.config import InferenceConfig
from lightning_ray.inference.engine import EngineState, InferenceEngine
from lightning_ray.inference.lifeline import BLOCK_TOKENS, HEADS, LIFELINE, SPIN
from lightning_ray.policies.handover import Handed
from lightning_ray.spans import SpanClient

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
UPDATE_TRIES = 3
"""How often a version is handed over when engines die meanwhile."""


@dataclass(frozen=True)
class _Engine:
    """One actor, where it can be reached, and how its death is heard of."""

    actor: ActorHandle
    url: "ray.ObjectRef"
    """Its base URL, once it answers."""
    gone: "ray.ObjectRef"
    """Ready once it, or its vLLM, has died."""
    folder: str
    """Of the version that it starts with."""


class InferenceGroup:
    """`config.num_engines` engines that answer for one policy."""

    def __init__(
        self,
        config: InferenceConfig,
        model_dir: str,
        policy: str,
        names: Sequence[str],
        version: int,
        spans: SpanClient,
    ):
        """Starts the actors; `wait_ready` waits for them, so that others can start meanwhile."""
        self.key = secrets.token_urlsafe(24)
        self._config = config
        self._arguments = (policy, list(names), self.key, spans)
        self._current = (model_dir, version)
        self._engines = [self._start() for _ in range(config.num_engines)]
        self._replacing: dict[int, float] = {}
        """Engines that start in place of dead ones, by their place, and since when."""
        self._untold = 0
        self._lock = threading.Lock()
        """Held while engines are replaced or given weights."""
        self.urls: list[str] = []

    def wait_ready(self) -> list[str]:
        """The engines' base URLs, once every engine answers.

        Raises InfrastructureError when one does not, UserError when a setting is to blame.
        """
        limit = self._config.start_timeout_s
        try:
            self.urls = ray.get([engine.url for engine in self._engines], timeout=limit)
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"the vLLM engine did not start in {limit:g} s") from error
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(
                error.cause, UserError
            ):
                raise error.cause from error
            raise InfrastructureError(f"the vLLM engine did not start: {_cause(error)}") from error
        return self.urls

    def update_weights(
        self,
        folder: str,
        version: int,
        drain: bool = False,
        handed: Handed | None = None,
        by_store: bool = False,
    ) -> float:
        """Hands version `version`, a model folder, to every engine.

        `handed` says where else the weights are, and what they are: the folder may then be written
        only now; `by_store` says not to take them from the learner's memory. To `drain` is to let
        calls finish on the version they began with. Returns the longest time that an engine's
        calls waited, seconds. Raises InfrastructureError when an engine did not take it on.
        """
        with self._lock:
            return self._update(folder, version, drain, handed, by_store)

    def _update(
        self, folder: str, version: int, drain: bool, handed: Handed | None, by_store: bool
    ) -> float:
        # For calls to drain, for the change, and for the engine to go on after one that failed.
        limit = 2 * self._config.update_timeout_s + 60.0
        self._current = (folder, version)
        self._restart_hopeless()
        tries = UPDATE_TRIES
        while True:
            self._wait_replaced()
            pending = [
                one.actor.update_weights.remote(folder, version, drain, handed, by_store)
                for one in self._engines
            ]
            try:
                return max(ray.get(pending, timeout=limit))
            except ray.exceptions.GetTimeoutError as error:
                raise InfrastructureError(
                    f"an engine did not take on version {version} in {limit:g} s"
                ) from error
            except ray.exceptions.RayError as error:
                # One that died has another in its place, which starts with this version; engines
                # that took it on already are not disturbed.
                tries -= 1
                ends = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
                died = isinstance(error, ends) and self._replace_dead(5.0)
                if not died or not tries:
                    raise InfrastructureError(
                        f"an engine did not take on version {version}: {_cause(error)}"
                    ) from error

    def nodes(self) -> set[str]:
        """The nodes that engines which answer are on, as Ray calls them."""
        return {state.node for state in self._answering()}

    def gpus(self) -> set[str]:
        """Node and GPU of every engine that answers; "" among them for one without."""
        return {state.gpu for state in self._answering()}

    def _answering(self) -> list[EngineState]:
        """What engines that answer say of themselves; nothing where one has just died."""
        asked = [
            e.actor.state.remote() for n, e in enumerate(self._engines) if n not in self._replacing
        ]
        try:
            states: list[EngineState] = ray.get(asked, timeout=10.0)
            return states
        except ray.exceptions.RayError as error:
            # One that has just died: where the others are is asked again for the next version.
            log.info("an engine did not say which node it is on: %s", error)
            return []

    def states(self, timeout_s: float = 10.0) -> list[EngineState]:
        """What every engine says of itself."""
        return ray.get([engine.actor.state.remote() for engine in self._engines], timeout=timeout_s)

    def weight_digests(self, timeout_s: float = 60.0) -> list[str]:
        """A digest of every engine's weights; equal weights have equal digests.

        Raises InfrastructureError when an engine does not say.
        """
        asking = [engine.actor.weight_digest.remote() for engine in self._engines]
        try:
            digests: list[str] = ray.get(asking, timeout=timeout_s)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
            raise InfrastructureError(
                f"an engine did not give the digest of its weights: {_cause(error)}"
            ) from error
        return digests

    def mend(self) -> int:
        """Starts another engine at the place of each that has died; returns how many died since it
        was last asked.

        Does not wait for them, nor for weights that another thread hands over: they are seen to
        there. Raises InfrastructureError when one does not come within `inference.start_timeout_s`.
        """
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            self._replace_dead()
            self._look_at_replaced(0.0)
            died, self._untold = self._untold, 0
            return died
        finally:
            self._lock.release()

    def _replace_dead(self, timeout_s: float = 0.0) -> int:
        """Replaces those whose death is known within `timeout_s` seconds; returns how many."""
        gone, _ = ray.wait(
            [engine.gone for engine in self._engines],
            num_returns=len(self._engines),
            timeout=timeout_s,
        )
        dead = [place for place, engine in enumerate(self._engines) if engine.gone in gone]
        for place in dead:
            log.warning("the engine at %s died; another takes its place", self.urls[place])
            # Its vLLM may have died and not the actor.
            ray.kill(self._engines[place].actor)
            self._engines[place] = self._start(self.urls[place])
            self._replacing[place] = time.monotonic()
        self._untold += len(dead)
        return len(dead)

    def _restart_hopeless(self) -> None:
        """Starts those anew, on the present version, that wait for one that nobody will write."""
        for place in self._replacing:
            if not Path(self._engines[place].folder).is_dir():
                ray.kill(self._engines[place].actor)
                self._engines[place] = self._start(self.urls[place])
                self._replacing[place] = time.monotonic()

    @property
    def version(self) -> int:
        """What the engines were given last."""
        return self._current[1]

    @property
    def alive(self) -> int:
        """Engines that answer, as far as `mend` has seen."""
        return len(self._engines) - len(self._replacing)

    def _wait_replaced(self) -> None:
        while self._replacing:
            self._look_at_replaced(1.0)

    def _look_at_replaced(self, timeout_s: float) -> None:
        """Takes note of engines that have come; waits at most so long for the first."""
        limit = self._config.start_timeout_s
        for place, since in list(self._replacing.items()):
            ready, _ = ray.wait([self._engines[place].url], timeout=timeout_s)
            if ready:
                try:
                    self.urls[place] = ray.get(ready[0], timeout=limit)
                except ray.exceptions.ActorUnschedulableError:
                    # Its node was lost with it, and was not known to be when it was started.
                    log.info("the node of %s is gone; trying elsewhere", self.urls[place])
                    self._engines[place] = self._start(self.urls[place])
                    if time.monotonic() > since + limit:
                        raise InfrastructureError(
                            f"no node took an engine in place of one that died in {limit:g} s"
                        ) from None
                    continue
                except ray.exceptions.RayError as error:
                    raise InfrastructureError(
                        f"no engine could be started in place of one that died: {_cause(error)}"
                    ) from error
                del self._replacing[place]
            elif time.monotonic() > since + limit:
                raise InfrastructureError(
                    f"no engine came in place of one that died within {limit:g} s"
                )

    def _start(self, url: str = "") -> _Engine:
        """An engine, starting; at the address `url` of one that died, where its node still is."""
        config = self._config
        options: dict[str, Any] = {}
        port = 0
        if url:
            address = urlsplit(url)
            host = address.hostname or ""
            if (node := _node_at(host)) is not None:
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
            if node is not None or host in LOOPBACK:
                port = address.port or 0
        actor = ray.remote(InferenceEngine).options(
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            label_selector=config.node_labels or None,
            max_concurrency=1000,
            runtime_env={"env_vars": engine_environment(config)},
            **options,
        )
        policy, names, key, spans = self._arguments
        folder, version = self._current
        engine = actor.remote(config, folder, policy, names, version, key, spans, port)
        return _Engine(engine, engine.start.remote(), engine.gone.remote(), folder)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the engines and vLLM's own processes."""
        stopping = [engine.actor.stop.remote() for engine in self._engines]
        ray.wait(stopping, num_returns=len(stopping), timeout=timeout_s)
        for engine in self._engines:
            ray.kill(engine.actor)


def _node_at(host: str) -> str | None:
    """The node that lives at this address; None for loopback, which any may mean."""
    if host in LOOPBACK:
        return None
    alive = [node for node in ray.nodes() if node["Alive"]]
    return next((node["NodeID"] for node in alive if node["NodeManagerAddress"] == host), None)


def engine_environment(config: InferenceConfig) -> dict[str, str]:
    """Environment of an engine's process, which vLLM reads while it is imported."""
    found = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.kv_cache_gib))),
        # The threads are not bound to cores: with engine and learner on one machine, each may use
        # all of them while the other waits.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.num_threads),
        "VLLM_NO_USAGE_STATS": "1",
        LIFELINE: "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.num_gpus == 0:
        # glibc's malloc then asks for pages of 2 MB: all weights are read for every token, and
        # addresses in pages of 4 KB have to be looked up so often that decoding takes a tenth more.
        found["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        # Whatever spins there takes a core from what computes.
        found[SPIN] = "0.0005"
        found[BLOCK_TOKENS] = "16"
        found[HEADS] = "1"
    return found


def _cause(error: BaseException) -> str:
    """The last line of what an actor reported, which names the error itself."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
